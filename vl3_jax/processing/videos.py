"""Opens a video of any kind. Nothing is decoded but what its timing needs; frames come one by one.

clip = open_video("a.mp4", FrameSamplingOptions(fps=1, max_frames=180))
clip.height, clip.width, len(clip.indices), clip.timestamps      # enough to choose the size of the frames
for image in clip.frames(): ...                                  # and to resize each as it comes
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from vl3_jax.errors import InputError
from vl3_jax.processing.frame_sets import AnimationReader, ArrayVideoReader, FolderVideoReader
from vl3_jax.processing.video_file import FileVideoReader
from vl3_jax.processing.video_reader import FrameSamplingOptions, VideoReader

_ANIMATIONS = (b"GIF8", b"RIFF", b"\x89PNG")  # RIFF is AVI, too: told apart by what follows


def open_video(
    source: Any, options: FrameSamplingOptions | None = None, timestamps: Sequence[float] | None = None
) -> VideoReader:
    """Opens a path (file or folder of frames), bytes, a binary file object, or frames in memory.

    Args:
      source: a video file, animated GIF / WebP / PNG, folder; their bytes; or frames already chosen:
        [t, h, w, 3] or a list of pictures (paths, arrays, PIL images).
      options: which frames are shown; for frames in memory only `max_frames` may apply, and only if given.
      timestamps: of frames in memory, seconds; without, none are written.

    Returns:
      A `Clip`.

    Raises:
      InputError: missing, unreadable, without pictures; or the window lies outside it. Names the file.
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
        return _of_kind(data, data[:12], "video bytes", options)
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
            start = file.read(12)
        return _of_kind(name, start, name, options)
    if hasattr(source, "read"):
        return open_video(source.read(), options)
    raise InputError(f"a video cannot be a {type(source).__name__}; give a path, bytes, or frames as arrays")


def _of_kind(source: str | bytes, start: bytes, name: str, options: FrameSamplingOptions) -> VideoReader:
    animated = start.startswith(_ANIMATIONS) and (start[:4] != b"RIFF" or start[8:12] == b"WEBP")
    return (AnimationReader if animated else FileVideoReader)(source, name, options)
