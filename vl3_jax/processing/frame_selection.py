"""Which frames of a video are shown to the model, and the time written before each: pure arithmetic.

Frames are counted in presentation order. `official` is what the released weights were trained on;
`native` is what the transformers port does. Both are kept to the letter, their surprises included.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

FOLDER_FPS = 3.0  # the rate the reference assumes for a folder of frames
GIF_FPS = 25.0  # and for a GIF, whatever durations the file states
NATIVE_MIN_FRAMES = 4


@dataclasses.dataclass(frozen=True)
class FrameSelection:
    """The chosen frames.

    Attributes:
      indices: source frame of each chosen one; an index may repeat.
      timestamps: the time each is labelled with, in seconds of the file.
    """

    indices: list[int]
    timestamps: list[float]

    def capped(self, max_frames: int | None) -> "FrameSelection":
        """At most `max_frames` of them: evenly spaced, first and last included, positions truncated."""
        keep = cap_indices(len(self.indices), max_frames)
        return FrameSelection([self.indices[i] for i in keep], [self.timestamps[i] for i in keep])


def cap_indices(count: int, max_frames: int | None) -> list[int]:
    """Positions that remain of `count` frames when at most `max_frames` are wanted (None: all)."""
    if max_frames is None or count <= max_frames:
        return list(range(count))
    return np.linspace(0, count - 1, max_frames, dtype=int).tolist()


def by_ticks(starts: Sequence[int], end: int, unit: Fraction, fps: Fraction, label_start: float) -> FrameSelection:
    """The official rule: each tick of length 1 / fps shows the last frame that begins in or before it.

    Equals FFmpeg's `fps=<fps>:round=down`. The label of a tick is its own start, so at 1 fps a frame labelled
    0.0 s was really taken just before 1 s. An unfinished last tick yields nothing.

    Args:
      starts: when each frame begins, ascending, in `unit`, from the origin of the ticks.
      end: when the last frame ends.
      unit: seconds.
      fps: ticks in a second.
      label_start: what the first tick is labelled, in seconds.
    """
    ticks_per_unit = unit * fps
    tick_of = [start * ticks_per_unit.numerator // ticks_per_unit.denominator for start in starts]
    count = max(math.floor(end * ticks_per_unit), 0) if starts else 0
    # Ticks before the first frame show what the first frame's own tick shows.
    indices = [bisect.bisect_right(tick_of, max(tick, tick_of[0])) - 1 for tick in range(count)]
    return FrameSelection(indices, tick_labels(count, fps, label_start))


def tick_labels(count: int, fps: Fraction, label_start: float) -> list[float]:
    """label_start, label_start + 1 / fps, ... with the rounding of `np.arange`, on which the printed tenth depends."""
    step = 1 / float(fps)
    return np.arange(label_start, label_start + (count + 1) * step, step)[:count].tolist()


def by_index(
    total: int, rate: float, fps: float, max_frames: int, start: float | None = None, end: float | None = None
) -> FrameSelection:
    """The official rule for folders, GIFs and windows shorter than a second: the middle of each step.

    Args:
      total: frames in the source.
      rate: frames per second of the source.
      fps: frames wanted per second.
      max_frames: with more than this many seconds, evenly spaced frames are taken instead.
      start: in seconds; None is the beginning.
      end: in seconds; None is the end.
    """
    first = 0 if start is None else max(int(start * rate) - 1, 0)
    last = total - 1 if end is None else min(int(end * rate) - 1, total - 1)
    length = max(last - first + 1, 0)
    if length and length / rate < max_frames:
        step = int(min(rate // min(fps, rate), length))
        picks = range(step // 2, length, step)
    else:
        picks = cap_indices(length, max_frames)
    indices = [first + pick for pick in picks]
    return FrameSelection(indices, [index / rate for index in indices])


def native(
    total: int,
    rate: float,
    fps: float,
    max_frames: int,
    start: float | None = None,
    end: float | None = None,
    min_frames: int = NATIVE_MIN_FRAMES,
) -> FrameSelection:
    """The transformers port's rule: evenly spaced indices, labelled index / rate.

    A window (which the port does not know) restricts the frames to those labelled start <= time < end.
    """
    first = 0 if start is None else max(math.ceil(start * rate), 0)
    last = total if end is None else min(math.ceil(end * rate), total)
    length = last - first
    if length <= 0:
        return FrameSelection([], [])
    count = math.floor(min(max(length / rate * fps, min_frames), max_frames, length))
    step = length / count
    # The port steps in float32, which decides where a product is a hair below an integer. Where that takes it past
    # the last frame, it fails; here the pick is left out.
    picks = (np.arange(math.ceil(length / step)) * step).astype(np.float32).astype(int)
    indices = [first + int(pick) for pick in picks if pick < length]
    return FrameSelection(indices, [index / rate for index in indices])
