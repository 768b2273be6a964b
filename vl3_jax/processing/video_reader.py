"""What every kind of video offers: how many frames are shown and their times, then the frames, one by one."""

import abc
import dataclasses
import math
from collections.abc import Iterator
from fractions import Fraction

from PIL import Image

from vl3_jax.errors import InputError

DEFAULT_FPS = 1.0
DEFAULT_MAX_FRAMES = 180


class PlanChangedError(Exception):
    """A damaged video held fewer frames than it promised. The clip has planned anew; ask it for its frames again."""


@dataclasses.dataclass(frozen=True)
class FrameSamplingOptions:
    """How frames are chosen.

    Attributes:
      fps: frames shown per second of video.
      max_frames: at most so many, evenly spaced.
      start: seconds of the file; None is its beginning.
      end: seconds of the file; None is its end.
      precise_time: keep the ticks anchored at 0 when `start` is given, instead of at `start`.
      preprocess: "official" or "native".
      threads: decoder threads; 0 lets FFmpeg choose.
    """

    fps: float = DEFAULT_FPS
    max_frames: int = DEFAULT_MAX_FRAMES
    start: float | None = None
    end: float | None = None
    precise_time: bool = False
    preprocess: str = "official"
    threads: int = 0

    @property
    def exact_fps(self) -> Fraction:
        """As FFmpeg would read it from a command line: 29.97 is 2997/100, not the nearest binary fraction."""
        return Fraction(str(self.fps))

    def check(self, name: str) -> None:
        """Raises InputError for values that no video could satisfy."""
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise InputError(f"{name}: fps is {self.fps}; give a number above 0")
        if self.max_frames < 1:
            raise InputError(f"{name}: max_frames is {self.max_frames}; give at least 1")
        for label, value in (("start", self.start), ("end", self.end)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name}: {label} is {value}; give seconds from 0 on")
        if self.end is not None and (self.start or 0) >= self.end:
            raise InputError(f"{name}: start {self.start or 0} s is not before end {self.end} s; swap or widen them")


class VideoReader(abc.ABC):
    """A video of which nothing is decoded yet.

    Attributes:
      name: for messages: the path, or what kind of object it was.
      height: upright, in pixels, of the first frame.
      width: upright, in pixels, of the first frame.
      indices: the source frame of each frame shown.
      timestamps: seconds written before each frame; None writes none.
      notes: what a user should be told, one line each.
    """

    name: str
    height: int
    width: int
    indices: list[int]
    timestamps: list[float] | None
    notes: list[str]

    @abc.abstractmethod
    def frames(self) -> Iterator[Image.Image]:
        """The frames shown, upright and in RGB, as many as `indices`; no more than a few are held at a time.

        Raises:
          PlanChangedError: see there.
          InputError: nothing can be read.
        """
