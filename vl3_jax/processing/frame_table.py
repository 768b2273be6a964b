"""Presentation times of the frames of a video file, found without decoding where the container states them."""

import contextlib
import dataclasses
from array import array
from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError

from vl3_jax.processing.parameter_sets import ParameterSetWatch
from vl3_jax.processing.timeline import Timeline, clock_may_jump, frame_duration, time_base
from vl3_jax.processing.video_container import stored_packets

_MAX_JOINED_GAP = 16  # packets; shorter gaps between two ranges are decoded rather than skipped


@dataclasses.dataclass(frozen=True)
class PacketTable:
    """The packets of a video stream in decoding order.

    Attributes:
      times: Presentation time of each packet on the timeline of the file, in time units.
      keys: Numbers of the packets with a key frame, ascending.
      setups: Numbers of the packets with a palette or parameter sets that hold for later packets too, ascending.
      hidden: Numbers of the packets that are decoded but not shown, because an edit list cuts them off.
    """

    times: Sequence[int]
    keys: Sequence[int]
    setups: Sequence[int] = ()
    hidden: Collection[int] = ()


@dataclasses.dataclass(frozen=True)
class FrameTable:
    """The frames of a video stream in presentation order.

    Attributes:
      starts: Presentation time of each frame on the timeline of the file, in `time_base` units.
      end: End of the last frame, in `time_base` units.
      time_base: Length of a time unit in seconds.
      rate: Average frames per second, as the container states it.
      stream_start: Start of the stream in seconds.
      container_start: Start of the file in seconds; its sound may start before the video stream.
      clock_may_jump: Whether the format allows its clock to jump; the `ffmpeg` program then reads the clock of the
        video stream alone.
      packets: The packets; None where the times are known only from decoding.
      complete: Whether the file was read to its end.
      header_seconds: End of the stream in seconds as the header states it; None if it does not, or if the clock jumps.
    """

    starts: Sequence[int]
    end: int
    time_base: Fraction
    rate: float
    stream_start: Fraction
    container_start: Fraction
    clock_may_jump: bool = False
    packets: PacketTable | None = None
    complete: bool = True
    header_seconds: float | None = None

    @property
    def seconds(self) -> float:
        """End of the last frame in seconds from the beginning of the file."""
        return self.seconds_at(self.end)

    def seconds_at(self, time: int) -> float:
        """Returns a time of the stream in seconds from the beginning of the file."""
        return float(time * self.time_base - self.container_start)

    @property
    def span(self) -> float:
        """Seconds from the first frame to the end of the last one."""
        return float((self.end - self.starts[0]) * self.time_base)


def scan_packets(
    container: InputContainer, stream: av.VideoStream, stop: float | None
) -> tuple[FrameTable, av.VideoFrame | None]:
    """Reads the packets of a container and decodes only the first frame, from which the size is known.

    If packets have no times, or two have the same, the table is empty: use `scan_frames`.

    Args:
      container: A freshly opened container.
      stream: Video stream of the container.
      stop: Seconds from the beginning of the file after which no frame is needed; None reads the whole file.

    Returns:
      The table, and the first frame or None if nothing could be decoded.
    """
    timeline, watch, empty = Timeline(container, stream), ParameterSetWatch(stream), _table(container, stream, [], 0)
    times, keys, setups, hidden = array("q"), array("q"), array("q"), set()
    last, last_duration = -(2**63), 0
    first_frame, usable, complete = None, True, True
    for packet in stored_packets(container, stream):
        timeline.place(packet)
        if first_frame is None:
            with contextlib.suppress(FFmpegError, EOFError):
                first_frame = next(iter(packet.decode()), None)
        number, time, decoding_time = len(times), packet.pts, packet.dts
        usable = usable and time is not None
        if time is None or not usable:
            if first_frame is not None:
                break
            continue
        times.append(time)
        if packet.is_keyframe:
            keys.append(number)
        if packet.is_discard:
            hidden.add(number)
        elif time >= last:
            last, last_duration = time, packet.duration or 0
        if watch.concerns_later(packet):
            setups.append(number)
        if stop is not None and decoding_time is not None and empty.seconds_at(decoding_time) > stop:
            complete = False
            break
    if first_frame is None:
        with contextlib.suppress(FFmpegError, EOFError):
            first_frame = next(iter(stream.codec_context.decode(None)), None)
    shown = np.delete(np.asarray(times), sorted(hidden)) if hidden else np.asarray(times)
    starts = np.unique(shown)
    if not usable or not len(starts) or len(starts) < len(shown):
        return empty, first_frame
    table = _table(container, stream, starts.tolist(), last_duration, timeline.moved)
    packets = PacketTable(times, keys, setups, hidden)
    return dataclasses.replace(table, packets=packets, complete=complete), first_frame


def scan_frames(container: InputContainer, stream: av.VideoStream, stop: float | None) -> FrameTable:
    """Decodes the stream to find which frames it really yields, and when; no frame is kept."""
    empty, starts, complete, duration = _table(container, stream, [], 0), array("q"), True, 0
    for time, frame in timed_frames(container, stream):
        starts.append(time)
        duration = frame.duration or 0
        if stop is not None and empty.seconds_at(time) > stop:
            complete = False
            break
    table = _table(container, stream, starts, duration, clock_moved=True)
    return dataclasses.replace(table, complete=complete)


def timed_frames(container: InputContainer, stream: av.VideoStream) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields all frames that can be decoded, skipping damaged packets, each with its own time.

    The time is that of its packet. Where the stream has too few of these, or false ones, it is the time at which the
    frame was decoded, and where there is none, it goes on as before. A frame that comes too late, after others
    with a later time, is left out, as players do.
    """
    usual_duration = frame_duration(stream)
    last, last_duration = None, 0
    last_stated = last_decoded = float("-inf")
    false_stated = false_decoded = 0
    for frame in _decoded_frames(container, stream):
        stated, decoded = frame.pts, frame.dts
        if decoded is not None:
            false_decoded += decoded <= last_decoded
            last_decoded = decoded
        elif stated is not None:
            last_decoded = stated
        if stated is not None:
            false_stated += stated <= last_stated
            last_stated = stated
        elif decoded is not None:
            last_stated = decoded
        time = stated if decoded is None or (stated is not None and false_stated <= false_decoded) else decoded
        if time is None:
            time = 0 if last is None else last + last_duration
        if last is not None and time < last:
            continue
        is_stated = stated is not None or decoded is not None
        last_duration = time - last if is_stated and last is not None else frame.duration or usual_duration
        last = time
        yield time, frame


def packet_ranges(packets: PacketTable, wanted: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the ranges of packets that suffice to decode the frames at the `wanted` presentation times.

    Each range starts with a key frame that is presented no later than the wanted frame, which therefore depends on
    nothing before it. Packets before it with a palette or parameter sets are ranges of their own. Ranges that are close
    to each other are joined.

    Args:
      packets: The packets of the stream.
      wanted: Presentation times of the wanted frames.

    Returns:
      (first, last) packet index of each range, both inclusive, ascending.
    """
    wanted_times = set(wanted)
    ranges = []
    keys, num_keys_before = packets.keys, 0
    for last, time in enumerate(packets.times):
        if time not in wanted_times or last in packets.hidden:
            continue
        while num_keys_before < len(keys) and keys[num_keys_before] <= last:
            num_keys_before += 1
        before = (keys[number] for number in range(num_keys_before - 1, -1, -1))
        ranges.append((next((key for key in before if packets.times[key] <= time), 0), last))
    ranges += [(setup, setup) for setup in packets.setups if ranges and setup < ranges[-1][1]]
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + _MAX_JOINED_GAP:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return joined


def _decoded_frames(container: InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    timeline = Timeline(container, stream)
    for packet in stored_packets(container, stream):
        timeline.place(packet)
        with contextlib.suppress(FFmpegError, EOFError):
            yield from packet.decode()
    with contextlib.suppress(FFmpegError, EOFError):
        yield from stream.codec_context.decode(None)


def _table(
    container: InputContainer,
    stream: av.VideoStream,
    starts: Sequence[int],
    last_duration: int,
    clock_moved: bool = False,
) -> FrameTable:
    unit = time_base(stream)
    stream_start = stream.start_time if stream.start_time is not None else (starts[0] if starts else 0)
    container_start = stream_start * unit
    if container.start_time is not None:
        container_start = min(container_start, Fraction(container.start_time, av.time_base))
    ends = (stream_start + stream.duration) * unit if stream.duration and not clock_moved else None
    return FrameTable(
        starts=starts,
        end=starts[-1] + (last_duration or frame_duration(stream)) if starts else 0,
        time_base=unit,
        rate=float(stream.average_rate or stream.guessed_rate or 1),
        stream_start=stream_start * unit,
        container_start=container_start,
        clock_may_jump=clock_may_jump(container),
        header_seconds=None if ends is None else float(ends - container_start),
    )
