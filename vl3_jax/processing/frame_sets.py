"""Readers of videos that are not video files: a folder of images, an animated GIF or WebP, frames in memory."""

import io
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from vl3_jax.errors import InputError
from vl3_jax.processing import frame_selection, images
from vl3_jax.processing.frame_selection import FrameSelection
from vl3_jax.processing.video_reader import FrameSamplingOptions, VideoReader

_MILLISECOND = Fraction(1, 1000)
_DEFAULT_DURATION = 100  # ms, for animations that state none


class FolderVideoReader(VideoReader):
    """Reads the images of a folder, sorted by name, as a video of 3 frames per second."""

    def __init__(self, folder: str, options: FrameSamplingOptions):
        self.name, self.warnings = folder, []
        extensions = Image.registered_extensions()
        files = sorted(
            file
            for file in os.listdir(folder)
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in extensions
        )
        if not files:
            raise InputError(
                f"{folder}: no images in this folder; give a folder of PNG or JPEG frames, or a video file"
            )
        selection = _select_at_constant_rate(folder, len(files), frame_selection.FOLDER_FPS, options)
        self.indices, self.timestamps = selection.indices, selection.timestamps
        self._files = [os.path.join(folder, files[index]) for index in self.indices]
        first = images.open_image(self._files[0])
        self.height, self.width = first.height, first.width

    def frames(self) -> Iterator[Image.Image]:
        return (images.open_image(file).load() for file in self._files)


class AnimationReader(VideoReader):
    """Reads an animated GIF, WebP or PNG.

    The official rule treats a GIF as a video of 25 frames per second, whatever durations it states. The other formats,
    which the reference cannot read, are sampled by the times of their frames.
    """

    def __init__(self, source: str | bytes, name: str, options: FrameSamplingOptions):
        self.name, self.warnings = name, []
        self._source = source
        durations = []
        for image in self._all_frames():
            self.height, self.width = image.height, image.width
            durations.append(image.info.get("duration") or _DEFAULT_DURATION)
            format_name, stated_frames = image.format, getattr(image, "n_frames", 1)
        if not durations:
            raise InputError(f"{name}: damaged animation, no frame can be read; replace the file")
        if len(durations) < stated_frames:
            self.warnings.append(
                f"{name}: damaged; {len(durations)} of {stated_frames} frames could be read and are used"
            )
        selection = self._select(durations, format_name, options)
        self.indices, self.timestamps = selection.indices, selection.timestamps

    def _select(self, durations: list[float], format_name: str | None, options: FrameSamplingOptions) -> FrameSelection:
        total = len(durations)
        seconds = sum(durations) / 1000
        if options.preprocess == "native":
            return _select_at_constant_rate(self.name, total, total / seconds, options)
        start, end = options.start, options.end
        is_short_window = start is not None and end is not None and end - start < 1
        if format_name == "GIF" or is_short_window:
            rate = frame_selection.GIF_FPS if format_name == "GIF" else total / seconds
            return _select_at_constant_rate(self.name, total, rate, options)
        _check_start(self.name, seconds, options)
        window_start = options.start or 0.0
        offset = round(window_start * 1000)
        ends = np.cumsum(np.round(durations).astype(int)).tolist()
        stop = ends[-1] if options.end is None else min(ends[-1], round(options.end * 1000))
        starts = [start - offset for start in [0, *ends[:-1]] if start < stop]
        first = sum(start < 0 for start in starts)
        first = min(first, len(starts) - 1)  # a window inside the last frame selects that frame
        selection = frame_selection.by_ticks(
            starts[first:], stop - offset, _MILLISECOND, options.exact_fps, window_start
        )
        selection = FrameSelection([first + index for index in selection.indices], selection.timestamps)
        selection = selection.capped(options.max_frames)
        return selection if selection.indices else FrameSelection([(first + len(starts)) // 2], [window_start])

    def frames(self) -> Iterator[Image.Image]:
        position = 0
        for index, image in enumerate(self._all_frames()):
            while position < len(self.indices) and self.indices[position] == index:
                yield images.to_rgb(image)
                position += 1
            if position == len(self.indices):
                return

    def _all_frames(self) -> Iterator[Image.Image]:
        try:
            image = Image.open(io.BytesIO(self._source) if isinstance(self._source, bytes) else self._source)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{self.name}: not a readable animation; convert it to MP4") from error
        with image:
            for index in range(getattr(image, "n_frames", 1)):
                try:
                    image.seek(index)
                    image.load()
                except (OSError, ValueError, SyntaxError, EOFError):
                    return
                yield image


class ArrayVideoReader(VideoReader):
    """Reads frames in memory: an array [t, h, w, 3], or a list of anything that `images.open_image` accepts.

    The frames are used as they are; only `max_frames` may reduce their number.
    """

    def __init__(self, frames: np.ndarray | Sequence[Any], timestamps: Sequence[float] | None, max_frames: int | None):
        self.name, self.warnings = "video frames", []
        if len(frames) == 0:
            raise InputError("video frames: the list is empty; give at least one frame")
        if timestamps is not None and len(timestamps) != len(frames):
            raise InputError(f"video frames: {len(frames)} frames but {len(timestamps)} timestamps; give one for each")
        self.indices = frame_selection.cap_indices(len(frames), max_frames)
        self.timestamps = None if timestamps is None else [float(timestamps[index]) for index in self.indices]
        self._frames = frames
        first = images.open_image(frames[self.indices[0]])
        self.height, self.width = first.height, first.width

    def frames(self) -> Iterator[Image.Image]:
        return (images.open_image(self._frames[index]).load() for index in self.indices)


def _select_at_constant_rate(name: str, total: int, rate: float, options: FrameSamplingOptions) -> FrameSelection:
    _check_start(name, total / rate, options)
    rule = frame_selection.native if options.preprocess == "native" else frame_selection.by_index
    selection = rule(total, rate, options.fps, options.max_frames, options.start, options.end)
    if selection.indices:
        return selection
    window_start = options.start or 0.0
    return FrameSelection([min(int(window_start * rate), total - 1)], [window_start])


def _check_start(name: str, seconds: float, options: FrameSamplingOptions) -> None:
    if options.start is not None and options.start >= seconds:
        raise InputError(f"{name}: start {options.start} s is not before its end at {seconds:.2f} s")
