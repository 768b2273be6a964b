"""Opens videos of every kind: files, animations, folders of frames and frames in memory.

Opening decodes no more than the selection of frames needs; the frames themselves are decoded one by one.

video = open_video("a.mp4", FrameSamplingOptions(fps=1, max_frames=180))
video.height, video.width, len(video.indices), video.timestamps    # enough to choose the target size
for frame in video.frames(): ...                                   # resize each frame as it is decoded
"""

import os
from collections.abc import Sequence
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.processing import raster_file, rgb_pixels
from vl3_jax.processing.frame_sets import AnimationReader, open_folder, open_frames
from vl3_jax.processing.media_source import first_bytes, path_or_bytes
from vl3_jax.processing.video_file import FileVideoReader
from vl3_jax.processing.video_reader import FrameSamplingOptions, VideoReader

_ANIMATIONS = (b"GIF8", b"RIFF", b"\x89PNG")  # RIFF is also AVI: what follows it differs


def open_video(
    source: Any, options: FrameSamplingOptions | None = None, timestamps: Sequence[float] | None = None
) -> VideoReader:
    """Opens a path (file or folder of frames), bytes, a binary file object, or frames in memory.

    Args:
      source: A video file, an animated GIF / WebP / PNG or a folder; their bytes; or frames that are already selected,
        as an array [t, h, w, 3] (anything with `__array__`) or a list or tuple of images (paths, arrays, PIL images).
      options: Options of frame selection; the defaults if None. `frame_sets.open_frames` says which apply to frames in
        memory; the others are refused.
      timestamps: Time in seconds of each frame in memory; None writes no times.

    Returns:
      The reader of the video.

    Raises:
      InputError: The source is missing, unreadable or without frames, or the window lies outside it; the error names
        the file.
    """
    options = options or FrameSamplingOptions()
    if holds_frames(source):
        return open_frames(source, timestamps, options)
    if timestamps is not None:
        raise InputError("timestamps belong to frames in memory; a video file has its own, so leave them out")
    data, name = path_or_bytes(source, "video", "video file or folder", "a path, bytes, or frames as arrays")
    options.check(name)
    if isinstance(data, str) and os.path.isdir(data):
        return open_folder(data, name, options)
    with raster_file.refuse_unreadable(name, "video"):
        head = first_bytes(data, 12)
    is_animation = head.startswith(_ANIMATIONS) and (head[:4] != b"RIFF" or head[8:] == b"WEBP")
    return (AnimationReader if is_animation else FileVideoReader)(data, name, options)


def holds_frames(source: Any) -> bool:
    """Returns whether a video consists of frames in memory: a list, a tuple or an array."""
    return isinstance(source, list | tuple) or rgb_pixels.is_array(source)
