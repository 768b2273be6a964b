"""Opens videos of every kind: files, animations, folders of frames and frames in memory.

Opening decodes no more than the selection of frames needs; the frames themselves are decoded one by one.

video = open_video("a.mp4", FrameSamplingOptions(fps=1, max_frames=180))
video.height, video.width, len(video.indices), video.timestamps    # enough to choose the target size
for frame in video.frames(): ...                                   # resize each frame as it is decoded
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from vl3_jax.errors import InputError
from vl3_jax.processing.frame_sets import AnimationReader, ArrayVideoReader, FolderVideoReader
from vl3_jax.processing.video_file import FileVideoReader
from vl3_jax.processing.video_reader import FrameSamplingOptions, VideoReader

_ANIMATIONS = (b"GIF8", b"RIFF", b"\x89PNG")  # RIFF is also AVI: what follows it differs


def open_video(
    source: Any, options: FrameSamplingOptions | None = None, timestamps: Sequence[float] | None = None
) -> VideoReader:
    """Opens a path (file or folder of frames), bytes, a binary file object, or frames in memory.

    Args:
      source: A video file, an animated GIF / WebP / PNG or a folder; their bytes; or frames that are already selected,
        as [t, h, w, 3] or a list of images (paths, arrays, PIL images).
      options: Options of frame selection; of these only `max_frames` applies to frames in memory, and only if options
        are passed.
      timestamps: Time in seconds of each frame in memory; None writes no times.

    Returns:
      The reader of the video.

    Raises:
      InputError: The source is missing, unreadable or without frames, or the window lies outside it; the error names
        the file.
    """
    if isinstance(source, np.ndarray | list | tuple):
        if isinstance(source, np.ndarray) and source.ndim != 4:
            raise InputError(f"video frames: shape {source.shape}; give [frames, height, width, 3]")
        return ArrayVideoReader(source, timestamps, options.max_frames if options else None)
    options = options or FrameSamplingOptions()
    if timestamps is not None:
        raise InputError("timestamps belong to frames in memory; a video file has its own, so leave them out")
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        options.check("video bytes")
        return _open_by_magic(data, data[:12], "video bytes", options)
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        options.check(name)
        if not os.path.exists(name):
            raise InputError(f"{name}: no such video file or folder; check the path")
        if os.path.isdir(name):
            return FolderVideoReader(name, options)
        if not os.path.getsize(name):
            raise InputError(f"{name}: the file is empty (0 bytes); replace it")
        with open(name, "rb") as file:
            head = file.read(12)
        return _open_by_magic(name, head, name, options)
    if hasattr(source, "read"):
        return open_video(source.read(), options)
    raise InputError(f"a video cannot be of type {type(source).__name__}; give a path, bytes, or frames as arrays")


def _open_by_magic(source: str | bytes, head: bytes, name: str, options: FrameSamplingOptions) -> VideoReader:
    is_animation = head.startswith(_ANIMATIONS) and (head[:4] != b"RIFF" or head[8:12] == b"WEBP")
    return (AnimationReader if is_animation else FileVideoReader)(source, name, options)
