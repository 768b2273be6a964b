"""Readers of videos that are not video files: a folder of images, an animated GIF or WebP, frames in memory."""

import collections
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from vl3_jax.errors import InputError
from vl3_jax.processing import frame_selection, images
from vl3_jax.processing.frame_selection import FrameSelection
from vl3_jax.processing.media_source import as_file
from vl3_jax.processing.video_reader import FrameSamplingOptions, VideoReader

_MILLISECOND = Fraction(1, 1000)
_DEFAULT_DURATION = 100  # ms, for animations that state none


class ImageSequenceReader(VideoReader):
    """Reads selected images as a video.

    Args:
      name: Name for messages.
      sources: All images of the video: anything that `images.open_image` accepts.
      selection: The selected ones, at least one.
    """

    def __init__(self, name: str, sources: np.ndarray | Sequence[Any], selection: FrameSelection):
        self.name, self.warnings, self.selection = name, [], selection
        self._sources = [sources[index] for index in selection.indices]
        first = images.open_image(self._sources[0])
        self.height, self.width = first.height, first.width

    def frames(self) -> Iterator[Image.Image]:
        return (images.open_image(source).load() for source in self._sources)


def open_folder(folder: str, options: FrameSamplingOptions) -> ImageSequenceReader:
    """Opens the images of a folder, sorted by name, as a video of 3 frames per second."""
    extensions = Image.registered_extensions()
    files = sorted(
        file
        for file in os.listdir(folder)
        if not file.startswith(".") and os.path.splitext(file)[1].lower() in extensions
    )
    if not files:
        raise InputError(f"{folder}: no images in this folder; give a folder of PNG or JPEG frames, or a video file")
    selection = _select_at_constant_rate(folder, len(files), frame_selection.FOLDER_FPS, options)
    return ImageSequenceReader(folder, [os.path.join(folder, file) for file in files], selection)


def open_frames(
    frames: np.ndarray | Sequence[Any], timestamps: Sequence[float] | None, max_frames: int | None
) -> ImageSequenceReader:
    """Opens frames in memory: an array [t, h, w, 3], or a list of anything that `images.open_image` accepts.

    The frames are used as they are; only `max_frames` may reduce their number.
    """
    if len(frames) == 0:
        raise InputError("video frames: the list is empty; give at least one frame")
    if timestamps is not None and len(timestamps) != len(frames):
        raise InputError(f"video frames: {len(frames)} frames but {len(timestamps)} timestamps; give one for each")
    times = None if timestamps is None else [float(time) for time in timestamps]
    selection = FrameSelection(list(range(len(frames))), times).capped(max_frames)
    return ImageSequenceReader("video frames", frames, selection)


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
        self.selection = self._select(durations, format_name, options)

    def _select(self, durations: list[float], format_name: str | None, options: FrameSamplingOptions) -> FrameSelection:
        total, seconds, is_gif = len(durations), sum(durations) / 1000, format_name == "GIF"
        if is_gif or options.by_index:
            rate = frame_selection.GIF_FPS if is_gif and options.preprocess != "native" else total / seconds
            return _select_at_constant_rate(self.name, total, rate, options)
        options.check_start(self.name, seconds)
        window_start = options.start or 0.0
        offset = round(window_start * 1000)
        ends = np.cumsum(np.round(durations).astype(int)).tolist()
        stop = ends[-1] if options.end is None else min(ends[-1], round(options.end * 1000))
        starts = [start - offset for start in [0, *ends[:-1]] if start < stop]
        first = min(sum(start < 0 for start in starts), len(starts) - 1)  # a window inside the last frame selects it
        selection = frame_selection.by_ticks(
            starts[first:], stop - offset, _MILLISECOND, options.exact_fps, window_start, first
        ).capped(options.max_frames)
        return selection if selection.indices else FrameSelection([(first + len(starts)) // 2], [window_start])

    def frames(self) -> Iterator[Image.Image]:
        repeats = collections.Counter(self.indices)
        for index, image in enumerate(self._all_frames()):
            yield from (images.to_rgb(image) for _ in range(repeats[index]))
            if index == self.indices[-1]:
                return

    def _all_frames(self) -> Iterator[Image.Image]:
        try:
            image = Image.open(as_file(self._source))
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


def _select_at_constant_rate(name: str, total: int, rate: float, options: FrameSamplingOptions) -> FrameSelection:
    options.check_start(name, total / rate)
    selection = options.select_at_constant_rate(total, rate)
    if selection.indices:
        return selection
    window_start = options.start or 0.0
    return FrameSelection([min(int(window_start * rate), total - 1)], [window_start])
