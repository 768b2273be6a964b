"""The common interface of video readers: the selected frames and their times first, then the frames one by one."""

import abc
import collections
import contextlib
import dataclasses
from collections.abc import Generator, Iterator, Sequence
from fractions import Fraction
from typing import NoReturn

from PIL import Image

from vl3_jax.errors import InputError
from vl3_jax.processing import frame_selection
from vl3_jax.processing.frame_selection import FrameSelection

MAX_FPS = 1000  # a larger rate is a mistake
MAX_SECONDS = 10**9
_INDEX_BASED_BELOW = 1  # second; in shorter windows the official rule selects by index too


class PlanChangedError(Exception):
    """A damaged video yields fewer frames than its container states.

    The reader has selected its frames again; the caller has to read the new selection and call `frames` again.
    """


@dataclasses.dataclass(frozen=True)
class FrameSamplingOptions:
    """Options that control which frames of a video are selected.

    Attributes:
      fps: Frames to select per second of video.
      max_frames: Maximum number of frames; more are reduced to so many evenly spaced ones.
      start: Start of the window in seconds of the file; None is the start of the file.
      end: End of the window in seconds of the file; None is the end of the file.
      precise_time: Keep the sampling ticks anchored at 0 when `start` is set, instead of at `start`.
      preprocess: "official" or "native".
      threads: Number of decoder threads; 0 lets FFmpeg choose.
    """

    fps: float = 1.0
    max_frames: int = 180
    start: float | None = None
    end: float | None = None
    precise_time: bool = False
    preprocess: str = "official"
    threads: int = 0

    @property
    def exact_fps(self) -> Fraction:
        """The rate as FFmpeg reads it from a command line: 29.97 is 2997/100, not the nearest binary fraction."""
        return Fraction(str(self.fps))

    def check(self, name: str) -> None:
        """Checks the options for values that no video can satisfy.

        Args:
          name: Name of the video for messages.

        Raises:
          InputError: An option is out of range, or `start` is not before `end`.
        """
        if not 0 < self.fps <= MAX_FPS:
            raise InputError(f"{name}: fps is {self.fps}; give a number above 0, up to {MAX_FPS:,}")
        if self.max_frames < 1:
            raise InputError(f"{name}: max_frames is {self.max_frames}; give at least 1")
        for label, value in (("start", self.start), ("end", self.end)):
            if value is not None and not 0 <= value <= MAX_SECONDS:
                raise InputError(f"{name}: {label} is {value}; give seconds from 0 to {MAX_SECONDS:,}")
        if self.end is not None and (self.start or 0) >= self.end:
            raise InputError(f"{name}: start {self.start or 0} s is not before end {self.end} s; swap or widen them")

    def check_start(self, name: str, seconds: float) -> None:
        """Raises `InputError`, which begins with `name`, if a video of this length ends before the window starts."""
        if self.start is not None and self.start >= seconds:
            raise InputError(f"{name}: start {self.start} s is not before its end at {seconds:.2f} s")

    @property
    def by_index(self) -> bool:
        """Whether frames are selected by index even where their times are known, as in the reference."""
        is_short = self.start is not None and self.end is not None and self.end - self.start < _INDEX_BASED_BELOW
        return is_short or self.preprocess == "native"

    def select_at_constant_rate(self, total: int, rate: float) -> FrameSelection:
        """Selects frames by index: with the native rule, or with the official one for sources without frame times.

        Args:
          total: Number of frames in the source.
          rate: Frames per second of the source.
        """
        rule = frame_selection.native if self.preprocess == "native" else frame_selection.by_index
        return rule(total, rate, self.fps, self.max_frames, self.start, self.end)


class VideoReader(abc.ABC):
    """A video whose frames are selected but not decoded yet.

    Attributes:
      name: Name for messages: the path, or the kind of object.
      height: Height of the upright first frame in pixels.
      width: Width of the upright first frame in pixels.
      selection: The selected frames, and the time in seconds written before each; None writes no times.
      warnings: Messages for the user, one line each.
    """

    name: str
    height: int
    width: int
    selection: FrameSelection
    warnings: list[str]

    @property
    def indices(self) -> list[int]:
        """Index of each selected frame in the source, ascending; an index may repeat."""
        return self.selection.indices

    @property
    def timestamps(self) -> list[float] | None:
        """Time in seconds of each selected frame, or None."""
        return self.selection.timestamps

    @property
    def num_frames(self) -> int:
        """The number of selected frames."""
        return len(self.indices)

    @property
    @abc.abstractmethod
    def frame_times(self) -> Sequence[float]:
        """The time in seconds of every frame of the source, selected or not, from the beginning of the source."""

    @abc.abstractmethod
    def decode(self, indices: Sequence[int]) -> Generator[tuple[int, Image.Image]]:
        """Yields any frames of the source with their indices, upright and in RGB.

        Args:
          indices: Indices in the source, ascending, each once. Frames that cannot be decoded are left out.
        """

    def frames(self) -> Iterator[Image.Image]:
        """Yields the selected frames, upright and in RGB, as many as `indices`; only a few are held at a time.

        Raises:
          PlanChangedError: The video is damaged and the selection has changed.
          InputError: No frame can be read.
        """
        missing = collections.Counter(self.indices)
        with contextlib.closing(self.decode(list(missing))) as decoded:
            for index, frame in decoded:
                if index != next(iter(missing)):
                    break
                yield from [frame] * missing.pop(index)
        if missing:
            self._plan_anew()

    def _plan_anew(self) -> NoReturn:
        """Selects the frames anew after some of them could not be decoded, and raises `PlanChangedError`."""
        raise InputError(f"{self.name}: decodes differently each time; replace the file")
