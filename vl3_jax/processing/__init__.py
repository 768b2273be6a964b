"""Pixels, frames and chat text to arrays: pictures, videos and conversations become samples of a packed batch."""
