"""Rules that select the frames of a video and the time label of each: pure arithmetic on frame times.

Frames are counted in presentation order. `official` is the rule that the released weights were trained with;
`native` is the rule of the transformers port. Both are reproduced exactly, including their irregularities.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

FOLDER_FPS = 3.0  # the frame rate that the reference assumes for a folder of frames
GIF_FPS = 25.0  # the frame rate that the reference assumes for a GIF, whatever durations the file states
NATIVE_MIN_FRAMES = 4  # if the window has so many


@dataclasses.dataclass(frozen=True)
class FrameSelection:
    """Selected frames of a video.

    Attributes:
      indices: Index of each selected frame in the source; an index may repeat.
      timestamps: Time label of each selected frame, in seconds of the file; None if the times are not known.
    """

    indices: list[int]
    timestamps: list[float] | None

    def capped(self, max_frames: int | None) -> "FrameSelection":
        """Returns at most `max_frames` of the frames, evenly spaced, with the first and the last included."""
        return self.at(cap_indices(len(self.indices), max_frames))

    def at(self, positions: Sequence[int]) -> "FrameSelection":
        """Returns the selected frames at these positions."""
        indices, times = self.indices, self.timestamps
        return FrameSelection([indices[i] for i in positions], times and [times[i] for i in positions])


def cap_indices(count: int, max_frames: int | None) -> list[int]:
    """Returns the evenly spaced positions that remain of `count` frames; `max_frames` None keeps all.

    Fractional positions are truncated.
    """
    if max_frames is None or count <= max_frames:
        return list(range(count))
    return [int(position) for position in np.linspace(0, float(count - 1), max_frames)]


def by_ticks(
    starts: Sequence[int],
    end: int,
    time_base: Fraction,
    fps: Fraction,
    label_start: float,
    first: int = 0,
    max_frames: int | None = None,
) -> FrameSelection:
    """Applies the official rule for video files: each tick of length 1 / fps takes the last frame started by its end.

    Equals FFmpeg's `fps=<fps>:round=down`. The label of a tick is its own start, so at 1 fps a frame labelled
    0.0 s was really taken just before 1 s. An unfinished last tick yields no frame, and so do the ticks that end before
    the first frame. The ticks are counted, and only those that `max_frames` keeps are looked at.

    Args:
      starts: Start time of each frame, ascending, in `time_base` units from the origin of the ticks.
      end: End time of the last frame, in `time_base` units.
      time_base: Length of a time unit in seconds.
      fps: Ticks per second.
      label_start: Label of the tick at the origin in seconds.
      first: Index of the first of these frames in the source.
      max_frames: Maximum number of frames, as in `FrameSelection.capped`; None keeps all.
    """
    ticks_per_unit = time_base * fps
    if not len(starts):
        return FrameSelection([], [])
    first_tick = max(math.floor(starts[0] * ticks_per_unit), 0)
    count = max(math.floor(end * ticks_per_unit) - first_tick, 0)
    ticks = [first_tick + position for position in cap_indices(count, max_frames)]
    indices = [first + index for index in at_ticks(starts, ticks, ticks_per_unit)]
    return FrameSelection(indices, tick_labels(ticks, fps, label_start))


def at_ticks(starts: Sequence[int], ticks: Sequence[int], ticks_per_unit: Fraction) -> list[int]:
    """Returns the index of the last frame that starts before the end of each tick; -1 is none."""
    tick_ends = (math.ceil((tick + 1) / ticks_per_unit) for tick in ticks)
    return [bisect.bisect_left(starts, tick_end) - 1 for tick_end in tick_ends]


def tick_labels(ticks: Sequence[int], fps: Fraction, label_start: float) -> list[float]:
    """Returns label_start + tick / fps of each tick, in seconds.

    They are rounded as those of `np.arange` from `label_start` on, because the printed tenth depends on it.
    """
    step = (label_start + 1 / float(fps)) - label_start
    return [label_start + tick * step for tick in ticks]


def by_index(
    total: int, rate: float, fps: float, max_frames: int, start: float | None = None, end: float | None = None
) -> FrameSelection:
    """Applies the official rule for folders, GIFs and windows shorter than a second: the middle frame of each step.

    Args:
      total: Number of frames in the source.
      rate: Frames per second of the source.
      fps: Frames to select per second.
      max_frames: Maximum length in seconds for stepping; a longer source yields this many evenly spaced frames.
      start: Start of the window in seconds; None is the start of the source.
      end: End of the window in seconds; None is the end of the source.
    """
    first = 0 if start is None else max(int(start * rate) - 1, 0)
    last = total - 1 if end is None else min(int(end * rate) - 1, total - 1)
    length = max(last - first + 1, 0)
    if length and length / rate < max_frames:
        step = int(min(rate // min(fps, rate), length))
        positions = range(step // 2, length, step)
    else:
        positions = cap_indices(length, max_frames)
    indices = [first + position for position in positions]
    return FrameSelection(indices, [index / rate for index in indices])


def native(
    total: int, rate: float, fps: float, max_frames: int, start: float | None = None, end: float | None = None
) -> FrameSelection:
    """Applies the rule of the transformers port: evenly spaced indices, labelled index / rate.

    A window, which the port does not have, restricts the frames to those labelled start <= time < end.

    Args:
      total: Number of frames in the source.
      rate: Frames per second of the source.
      fps: Frames to select per second.
      max_frames: Maximum number of frames.
      start: Start of the window in seconds; None is the start of the source.
      end: End of the window in seconds; None is the end of the source.
    """
    first = 0 if start is None else max(math.ceil(start * rate), 0)
    last = total if end is None else min(math.ceil(end * rate), total)
    length = last - first
    if length <= 0:
        return FrameSelection([], [])
    count = math.floor(min(max(length / rate * fps, NATIVE_MIN_FRAMES), max_frames, length))
    step = length / count
    # The port computes positions in float32, which matters where a product is just below an integer. Where this puts
    # a position past the last frame, the port fails; that position is left out here.
    positions = (np.arange(math.ceil(length / step)) * step).astype(np.float32).astype(int)
    indices = [first + int(position) for position in positions if position < length]
    return FrameSelection(indices, [index / rate for index in indices])
