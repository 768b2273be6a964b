"""Videos that are not video files: a folder of pictures, an animated GIF or WebP, frames already in memory."""

import io
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from vl3_jax.errors import InputError
from vl3_jax.processing import frame_selection, images
from vl3_jax.processing.video_reader import FrameSamplingOptions, VideoReader

_MILLISECOND = Fraction(1, 1000)
_DEFAULT_DURATION = 100  # ms, for animations that state none


class FolderVideoReader(VideoReader):
    """The pictures of a folder in the order of their names, at an assumed 3 frames per second."""

    def __init__(self, folder: str, options: FrameSamplingOptions):
        self.name, self.notes = folder, []
        known = Image.registered_extensions()
        files = sorted(
            file
            for file in os.listdir(folder)
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in known
        )
        if not files:
            raise InputError(
                f"{folder}: no pictures in this folder; give a folder of PNG or JPEG frames, or a video file"
            )
        rate = frame_selection.FOLDER_FPS
        chosen = _at_constant_rate(folder, len(files), rate, options)
        self.indices, self.timestamps = chosen.indices, chosen.timestamps
        self._files = [os.path.join(folder, files[index]) for index in self.indices]
        first = images.open_image(self._files[0])
        self.height, self.width = first.height, first.width

    def frames(self) -> Iterator[Image.Image]:
        """See `Clip.frames`."""
        return (images.open_image(file).load() for file in self._files)


class AnimationReader(VideoReader):
    """An animated GIF, WebP or PNG.

    Officially a GIF is a video of 25 frames per second, whatever durations it states; the other kinds, which the
    reference cannot read, are sampled by their real times.
    """

    def __init__(self, source: str | bytes, name: str, options: FrameSamplingOptions):
        self.name, self.notes = name, []
        self._source = source
        durations = []
        for image in self._all_frames():
            self.height, self.width = image.height, image.width
            durations.append(image.info.get("duration") or _DEFAULT_DURATION)
            kind, promised = image.format, getattr(image, "n_frames", 1)
        if not durations:
            raise InputError(f"{name}: damaged animation, not one frame can be read; replace the file")
        if len(durations) < promised:
            self.notes.append(f"{name}: damaged; {len(durations)} of {promised} frames could be read and are used")
        chosen = self._select(durations, kind, options)
        self.indices, self.timestamps = chosen.indices, chosen.timestamps

    def _select(
        self, durations: list[float], kind: str | None, options: FrameSamplingOptions
    ) -> frame_selection.FrameSelection:
        total = len(durations)
        seconds = sum(durations) / 1000
        if options.preprocess == "native":
            return _at_constant_rate(self.name, total, total / seconds, options)
        window = None not in (options.start, options.end) and options.end - options.start < 1
        if kind == "GIF" or window:
            return _at_constant_rate(
                self.name, total, frame_selection.GIF_FPS if kind == "GIF" else total / seconds, options
            )
        _check_start(self.name, seconds, options)
        begin = options.start or 0.0
        offset = round(begin * 1000)
        ends = np.cumsum(np.round(durations).astype(int)).tolist()
        stop = ends[-1] if options.end is None else min(ends[-1], round(options.end * 1000))
        starts = [start - offset for start in [0, *ends[:-1]] if start < stop]
        first = sum(start < 0 for start in starts)
        first = min(first, len(starts) - 1)  # a window inside the last frame shows that frame
        chosen = frame_selection.by_ticks(starts[first:], stop - offset, _MILLISECOND, options.exact_fps, begin)
        chosen = frame_selection.FrameSelection([first + index for index in chosen.indices], chosen.timestamps)
        chosen = chosen.capped(options.max_frames)
        return chosen if chosen.indices else frame_selection.FrameSelection([(first + len(starts)) // 2], [begin])

    def frames(self) -> Iterator[Image.Image]:
        """See `Clip.frames`."""
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
            raise InputError(f"{self.name}: not an animation that can be read; convert it to MP4") from error
        with image:
            for index in range(getattr(image, "n_frames", 1)):
                try:
                    image.seek(index)
                    image.load()
                except (OSError, ValueError, SyntaxError, EOFError):
                    return
                yield image


class ArrayVideoReader(VideoReader):
    """Frames in memory, shown as they are: [t, h, w, 3], or a list of anything that a picture can be."""

    def __init__(self, frames: np.ndarray | Sequence[Any], timestamps: Sequence[float] | None, max_frames: int | None):
        self.name, self.notes = "video frames", []
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
        """See `Clip.frames`."""
        return (images.open_image(self._frames[index]).load() for index in self.indices)


def _at_constant_rate(
    name: str, total: int, rate: float, options: FrameSamplingOptions
) -> frame_selection.FrameSelection:
    _check_start(name, total / rate, options)
    rule = frame_selection.native if options.preprocess == "native" else frame_selection.by_index
    chosen = rule(total, rate, options.fps, options.max_frames, options.start, options.end)
    if chosen.indices:
        return chosen
    begin = options.start or 0.0
    return frame_selection.FrameSelection([min(int(begin * rate), total - 1)], [begin])


def _check_start(name: str, seconds: float, options: FrameSamplingOptions) -> None:
    if options.start is not None and options.start >= seconds:
        raise InputError(f"{name}: start {options.start} s is not before its end at {seconds:.2f} s")
