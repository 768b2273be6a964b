"""Readers of videos that are not video files: a folder of images, an animated GIF or WebP, frames in memory."""

import contextlib
import itertools
import math
import os
import re
from collections.abc import Generator, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from vl3_jax.errors import InputError
from vl3_jax.processing import frame_selection, images, raster_file, rgb_pixels
from vl3_jax.processing.frame_selection import FrameSelection
from vl3_jax.processing.video_container import MAX_FRAME_PIXELS
from vl3_jax.processing.video_reader import FrameSamplingOptions, VideoReader

_MILLISECOND = Fraction(1, 1000)
_DEFAULT_DURATION = 100  # ms, for animations that state none


class ImageSequenceReader(VideoReader):
    """Reads selected images as a video.

    Args:
      name: Name for messages.
      sources: All images of the video: anything that `images.open_image` accepts.
      selection: The selected ones, at least one.
      note_transparency: Whether transparent frames get a warning.
    """

    def __init__(self, name: str, sources: Sequence[Any], selection: FrameSelection, note_transparency: bool):
        self.name, self.warnings, self.selection = name, [], selection
        self._sources, self._note_transparency = sources, note_transparency
        first = self._open(self.indices[0])
        self.height, self.width = first.height, first.width

    @property
    def frame_times(self) -> Sequence[float]:
        return [index / frame_selection.FOLDER_FPS for index in range(len(self._sources))]

    def decode(self, indices: Sequence[int]) -> Generator[tuple[int, Image.Image]]:
        noted = set()
        for index in indices:
            reader = self._open(index)
            frame = reader.load()
            for warning in reader.warnings:
                remark = warning.removeprefix(reader.name)
                if remark not in noted and warning not in self.warnings:
                    self.warnings.append(warning)
                noted.add(remark)
            yield index, frame

    def _open(self, index: int) -> images.ImageReader:
        return images.open_image(self._sources[index], f"video frame {index}", self._note_transparency)


def open_folder(folder: str, name: str, options: FrameSamplingOptions) -> ImageSequenceReader:
    """Opens the images of a folder as a video of 3 frames per second, in natural order: 2.png before 10.png.

    Args:
      folder: Path of the folder.
      name: Name for messages.
      options: Options of frame selection.

    Raises:
      InputError: The folder holds no images, or may not be read.
    """
    with raster_file.refuse_unreadable(name, "folder"), os.scandir(folder) as entries:
        files = [entry.name for entry in entries if _is_frame(entry)]
    if not files:
        raise InputError(f"{name}: no images in this folder; give a folder of PNG or JPEG frames, or a video file")
    files.sort(key=_natural_order)
    selection = _select_at_constant_rate(name, len(files), frame_selection.FOLDER_FPS, options)
    paths = [os.path.join(folder, file) for file in files]
    return ImageSequenceReader(name, paths, selection, options.preprocess != "native")


def open_frames(frames: Any, timestamps: Sequence[float] | None, options: FrameSamplingOptions) -> ImageSequenceReader:
    """Opens frames in memory, which are already chosen: an array [t, h, w, 3], or a list or tuple of images.

    Args:
      frames: The frames. An array is anything with `__array__`, and may have the channels before the height; images are
        anything that `images.open_image` accepts.
      timestamps: Time in seconds of each frame, or None.
      options: `max_frames` reduces the frames evenly, and `start` and `end` those with times. A rate does not apply.

    Raises:
      InputError: The frames or times are malformed, or an option does not apply to them.
    """
    if not isinstance(frames, list | tuple):
        frames = rgb_pixels.as_numpy(frames, "video frames")
        if frames.ndim != 4:
            raise InputError(f"video frames: shape {frames.shape}; give [frames, height, width, 3]")
    if len(frames) == 0:
        raise InputError("video frames: the list is empty; give at least one frame")
    options.check("video frames")
    selection = FrameSelection(list(range(len(frames))), _check_times(timestamps, len(frames)))
    for option in ("fps", "precise_time", *(("start", "end") if timestamps is None else ())):
        if getattr(options, option) != getattr(FrameSamplingOptions, option):
            raise InputError(f"video frames: {option} does not apply to frames already chosen; leave it out")
    if selection.timestamps is not None:
        start = -math.inf if options.start is None else options.start
        end = math.inf if options.end is None else options.end
        selection = selection.at([index for index, time in enumerate(selection.timestamps) if start <= time < end])
        if not selection.indices:
            raise InputError(f"video frames: none is from {start:g} s to {end:g} s; widen start and end")
    return ImageSequenceReader(
        "video frames", frames, selection.capped(options.max_frames), options.preprocess != "native"
    )


class AnimationReader(VideoReader):
    """Reads an animated GIF, WebP or PNG.

    The official rule treats a GIF as a video of 25 frames per second, whatever durations it states. The other formats,
    which the reference cannot read, are sampled by the times of their frames.
    """

    def __init__(self, source: str | bytes, name: str, options: FrameSamplingOptions):
        self.name, self.warnings = name, []
        self._source, self._note_transparency = source, options.preprocess != "native"
        with raster_file.opened(source, name, "animation") as image:
            format_name, orientation = image.format, raster_file.orientation(image)
            self._orientation, (self.height, self.width) = orientation, images.upright_size(image, orientation)
            self._check_pixels(1, image)
            stated_frames = _count_frames(image)
            self._check_pixels(stated_frames or 1, image)
        durations = [image.info.get("duration") or _DEFAULT_DURATION for image in self._all_frames()]
        if not durations:
            raise InputError(f"{name}: damaged animation, no frame can be read; replace the file")
        if len(durations) != stated_frames:
            stated = "" if stated_frames is None else f" of {stated_frames}"
            self.warnings.append(f"{name}: damaged after frame {len(durations)}{stated}; the frames up to it are used")
        self._ends = np.cumsum(durations) / 1000
        self.selection = self._select(durations, format_name, options)

    def _select(
        self, durations: Sequence[float], format_name: str | None, options: FrameSamplingOptions
    ) -> FrameSelection:
        total, seconds, is_gif = len(durations), sum(durations) / 1000, format_name == "GIF"
        if is_gif or options.by_index:
            rate = frame_selection.GIF_FPS if is_gif and options.preprocess != "native" else total / seconds
            return _select_at_constant_rate(self.name, total, rate, options)
        options.check_start(self.name, seconds)
        window_start = options.start or 0.0
        offset = round(window_start * 1000)
        ends = np.round(np.cumsum(durations)).astype(int).tolist()
        stop = ends[-1] if options.end is None else round(min(ends[-1], options.end * 1000))
        starts = [start - offset for start in [0, *ends[:-1]] if start < stop]
        first = max(sum(start <= 0 for start in starts) - 1, 0)  # the one on display when the window begins
        selection = frame_selection.by_ticks(
            starts[first:], stop - offset, _MILLISECOND, options.exact_fps, window_start, first, options.max_frames
        )
        return selection if selection.indices else FrameSelection([(first + len(starts)) // 2], [window_start])

    @property
    def frame_times(self) -> Sequence[float]:
        return [0.0, *self._ends[:-1].tolist()]

    def decode(self, indices: Sequence[int]) -> Generator[tuple[int, Image.Image]]:
        wanted = set(indices)
        for index, image in enumerate(self._all_frames()):
            if index in wanted:
                with raster_file.refuse_unreadable(self.name, "animation"):
                    pixels, remark = rgb_pixels.to_rgb(image)
                    pixels = images.upright(pixels, self._orientation)
                self._warn(remark)
                yield index, pixels
            if index == indices[-1]:
                return

    def _warn(self, remark: str | None) -> None:
        warning = f"{self.name}: {remark}"
        if remark and warning not in self.warnings and (self._note_transparency or remark != rgb_pixels.TRANSPARENT):
            self.warnings.append(warning)

    def _all_frames(self) -> Iterator[Image.Image]:
        """Yields every frame up to the first that cannot be read, without a default image that is none of them."""
        with raster_file.opened(self._source, self.name, "animation") as image:
            for index in itertools.count(_first_frame(image)):
                try:
                    with raster_file.refuse_unreadable(self.name, "animation"):
                        image.seek(index)
                        self._check_pixels(index + 1, image)  # a frame may enlarge the animation
                        image.load()
                except InputError:
                    return
                yield image

    def _check_pixels(self, frames: int, image: Image.Image) -> None:
        """Bounds the pixels of a frame, and of all frames, each of which may need those before it."""
        pixels, size = image.width * image.height, f"{image.width} x {image.height} pixels"
        if pixels > MAX_FRAME_PIXELS:
            excess = f"frames of {size} are too large to decode (limit {MAX_FRAME_PIXELS:,} pixels)"
        elif pixels * frames > images.MAX_PIXELS:
            excess = f"{frames:,} frames of {size} are too many to decode (limit {images.MAX_PIXELS:,} pixels in all)"
        else:
            return
        raise InputError(f"{self.name}: {excess}; save it smaller, or as MP4")


def _first_frame(image: Image.Image) -> int:
    """Returns 1 for an animated PNG that begins with an image for programs that cannot show animations."""
    return int(getattr(image, "default_image", False))


def _count_frames(image: Image.Image) -> int | None:
    """Returns the stated number of frames, or None if the file breaks off before it is known."""
    with contextlib.suppress(Exception):
        return getattr(image, "n_frames", 1) - _first_frame(image)
    return None


def _is_frame(entry: os.DirEntry) -> bool:
    extension = os.path.splitext(entry.name)[1].lower()
    return extension in raster_file.EXTENSIONS and not entry.name.startswith(".") and not entry.is_dir()


def _natural_order(name: str) -> tuple[list[str | int], str]:
    """Returns a key that sorts the numbers within names by their values."""
    parts = re.split(r"(\d+)", os.path.splitext(name)[0])
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _check_times(timestamps: Sequence[float] | None, count: int) -> list[float] | None:
    """Returns the times of frames in memory as floats."""
    if timestamps is None:
        return None
    try:
        times = [float(time) for time in timestamps]
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"video frames: timestamps are not seconds, one for each frame ({error})") from error
    if len(times) != count:
        raise InputError(f"video frames: {count} frames but {len(times)} timestamps; give one for each")
    if not all(map(math.isfinite, times)):
        raise InputError(f"video frames: a timestamp is {next(t for t in times if not math.isfinite(t))}; give seconds")
    return times


def _select_at_constant_rate(name: str, total: int, rate: float, options: FrameSamplingOptions) -> FrameSelection:
    options.check_start(name, total / rate)
    selection = options.select_at_constant_rate(total, rate)
    if selection.indices:
        return selection
    window_start = options.start or 0.0
    return FrameSelection([min(int(window_start * rate), total - 1)], [window_start])
