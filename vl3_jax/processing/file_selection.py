"""Selects the frames of a video file, and the label of each, from the times of its frames.

Without a window the ticks of the official rule begin where those of the `ffmpeg` program do, and labels begin with the
start of the stream. With a window, selection and labels count from the beginning of the file, as `ffmpeg -ss` does.
"""

import bisect
import math
from fractions import Fraction

from vl3_jax.errors import InputError
from vl3_jax.processing import frame_selection
from vl3_jax.processing.frame_selection import FrameSelection
from vl3_jax.processing.frame_table import FrameTable
from vl3_jax.processing.video_reader import FrameSamplingOptions

_MAX_SECONDS = 7 * 24 * 3600


def select_frames(table: FrameTable, options: FrameSamplingOptions, name: str) -> FrameSelection:
    """Applies the rule that the options name; a window too short for it yields the frame on display in its middle.

    Args:
      table: The frames of the file, at least one.
      options: The options, checked.
      name: Name of the video for messages.

    Raises:
      InputError: The video ends before the window starts or begins after it, or lasts a week or more.
    """
    if min(table.span, options.end or math.inf) >= _MAX_SECONDS:
        raise InputError(
            f"{name}: lasts {table.span / 86400:,.0f} days by its own clock; videos of a week or more are not read, so "
            "correct its times, or give a window with --start and --end"
        )
    options.check_start(name, table.seconds)
    begin = table.seconds_at(table.starts[0])
    if options.end is not None and options.end < begin:
        raise InputError(f"{name}: its pictures begin at {begin:.2f} s, after end {options.end} s; give a later end")
    if options.by_index:
        selection = _by_index(table, options)
    elif options.start is None and options.end is None:
        selection = _by_ticks(table, options)
    elif options.precise_time:
        selection = _by_ticks_of_the_file(table, options)
    else:
        selection = _by_ticks_of_the_window(table, options)
    return selection if selection.indices else _middle_frame(table, options)


def _by_ticks(table: FrameTable, options: FrameSamplingOptions) -> FrameSelection:
    """Applies the official rule to the whole file.

    Where sound begins whole ticks before the pictures, the first tick is the one in which the pictures begin.
    """
    fps = options.exact_fps
    begin = table.stream_start if table.clock_may_jump else table.container_start
    begin += math.floor((table.stream_start - begin) * fps) / fps
    starts, end = _relative(table, begin)
    return frame_selection.by_ticks(
        starts, end, table.time_base, fps, float(table.stream_start), max_frames=options.max_frames
    )


def _by_ticks_of_the_window(table: FrameTable, options: FrameSamplingOptions) -> FrameSelection:
    """Applies the official rule with ticks that start with the window."""
    fps, window_start = options.exact_fps, _window_start(table, options)
    first, last, stop = _window(table, options)
    # FFmpeg ends a window that lies inside the file at the start of the next frame; a still shot may outlast it by far.
    end = table.end
    if last < len(table.starts):
        end = table.starts[last] if (table.starts[last] - stop) * table.time_base < max(1, 1 / fps) else stop
    on_display = max(first - 1, 0)
    starts, _ = _relative(table, table.container_start + window_start)
    origin = table.starts[0] - starts[0]
    count = math.floor((end - origin) * table.time_base * fps)
    if options.end is not None:
        count = min(count, math.ceil((Fraction(options.end) - window_start) * fps + 1))
    limit = math.ceil(count / (table.time_base * fps))
    return frame_selection.by_ticks(
        starts[on_display:last], limit, table.time_base, fps, float(window_start), on_display, options.max_frames
    )


def _by_ticks_of_the_file(table: FrameTable, options: FrameSamplingOptions) -> FrameSelection:
    """Selects the window's part of the ticks anchored at the start of the file; labels still start with the window.

    As in FFmpeg, start and length are rounded to whole ticks, and a first tick that is half a tick late is repeated.
    """
    fps, window_start = options.exact_fps, _window_start(table, options)
    ticks_per_unit = table.time_base * fps
    starts, end = _relative(table, table.container_start)
    first = max(_round(window_start * fps), math.floor(starts[0] * ticks_per_unit))
    count = max(math.floor(end * ticks_per_unit) - first, 0)
    late = int(count > 0 and first - window_start * fps == Fraction(1, 2))
    count += late
    if options.end is not None:
        count = min(count, _round((Fraction(options.end) - window_start) * fps))
    positions = frame_selection.cap_indices(count, options.max_frames)
    ticks = [first + max(position - late, 0) for position in positions]
    labels = frame_selection.tick_labels(positions, fps, float(window_start))
    return FrameSelection(frame_selection.at_ticks(starts, ticks, ticks_per_unit), labels)


def _by_index(table: FrameTable, options: FrameSamplingOptions) -> FrameSelection:
    """Selects by index; in a window, the frames are those of its time, and each is labelled with its own time."""
    total, rate = len(table.starts), table.rate
    if options.start is None and options.end is None:
        return frame_selection.native(total, rate, options.fps, options.max_frames)
    first, last = _first_from(table, options.start or 0), total
    if options.end is not None:
        last = _first_from(table, options.end)
    if options.preprocess == "native":
        selection = frame_selection.native(last - first, rate, options.fps, options.max_frames)
        indices = [first + index for index in selection.indices]
    else:
        # The reference takes one frame more at the start and one less at the end; that at the start is never shown.
        on_display = [max(_first_after(table, seconds) - 1, 0) for seconds in (options.start or 0, options.end or 0)]
        begin, stop = max(on_display[0] - 1, 0), min(on_display[1], total)
        selection = frame_selection.by_index(stop - begin, rate, options.fps, options.max_frames)
        indices = [begin + index for index in selection.indices if begin + index >= on_display[0]]
    return FrameSelection(indices, [table.seconds_at(table.starts[index]) for index in indices])


def _middle_frame(table: FrameTable, options: FrameSamplingOptions) -> FrameSelection:
    """Selects the middle frame of a window too short for a tick of its own, labelled with the window's start."""
    first, last, _ = _window(table, options)
    if last <= first:  # between two frames: the one on display
        first, last = max(first - 1, 0), max(first, 1)
    has_window = options.start is not None or options.end is not None
    label = _window_start(table, options) if has_window else table.stream_start
    return FrameSelection([(first + last) // 2 if last - first > 1 else first], [float(label)])


def _window_start(table: FrameTable, options: FrameSamplingOptions) -> Fraction:
    """Returns the start of the window in seconds of the file; where the clock may jump, pictures set it."""
    start = Fraction(options.start or 0)
    return max(start, table.stream_start - table.container_start) if table.clock_may_jump else start


def _window(table: FrameTable, options: FrameSamplingOptions) -> tuple[int, int, int]:
    """Returns the index of the window's first frame, that of the first frame after it, and its end in time units.

    The length of the window counts from the start of its first frame, if that lies in the first tick.
    """
    window_start = _window_start(table, options)
    begin = _round((table.container_start + window_start) / table.time_base)
    first = bisect.bisect_left(table.starts, begin)
    if options.start is None:
        first = 0
    if options.end is None or first == len(table.starts):
        return first, len(table.starts), table.end
    late = table.starts[first] - begin
    if late * table.time_base * options.exact_fps >= 1:
        late = 0
    stop = begin + late + _round((Fraction(options.end) - window_start) / table.time_base)
    return first, bisect.bisect_left(table.starts, stop), stop


def _relative(table: FrameTable, begin: Fraction) -> tuple[list[int], int]:
    """Returns the start of each frame, and the end of the last, from `begin` on, which is in seconds of the stream."""
    origin = _round(begin / table.time_base)
    return [start - origin for start in table.starts], table.end - origin


def _first_from(table: FrameTable, seconds: float) -> int:
    """Returns the index of the first frame that starts at or after a time of the file."""
    return bisect.bisect_left(table.starts, _round((table.container_start + Fraction(seconds)) / table.time_base))


def _first_after(table: FrameTable, seconds: float) -> int:
    """Returns the index of the first frame that starts after a time of the file."""
    return bisect.bisect_right(table.starts, _round((table.container_start + Fraction(seconds)) / table.time_base))


def _round(value: Fraction) -> int:
    """Rounds to the nearest integer, halves up, as FFmpeg rescales times."""
    return int((value + Fraction(1, 2)) // 1)
