"""Image, video and text processing: turns conversations with media into samples of a packed batch."""
