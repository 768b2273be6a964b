"""Presentation times of the frames of a video file, found without decoding where the container states them."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
from av.container import InputContainer
from av.error import FFmpegError, InvalidDataError

_REORDERING = ("h264", "hevc")  # AVI stores no presentation times, so FFmpeg invents them for reordered frames
_MAX_JOINED_GAP = 16  # packets; shorter gaps between two ranges are decoded rather than skipped


@dataclasses.dataclass(frozen=True)
class FrameTable:
    """The frames of a video stream in presentation order.

    Attributes:
      starts: Presentation time of each frame, in `time_base` units.
      end: End of the last frame, in `time_base` units.
      time_base: Length of a time unit in seconds.
      rate: Average frames per second, as the container states it.
      stream_start: Start of the stream in seconds.
      container_start: Start of the file in seconds; its sound may start before the video stream.
      packets: (presentation time, is key frame) of each packet in decoding order; None where the times are known
        only from decoding.
      complete: Whether the file was read to its end.
      header_seconds: End of the stream in seconds as the header states it, or None if it does not.
    """

    starts: Sequence[int]
    end: int
    time_base: Fraction
    rate: float
    stream_start: Fraction
    container_start: Fraction
    packets: list[tuple[int, bool]] | None = None
    complete: bool = True
    header_seconds: float | None = None

    @property
    def seconds(self) -> float:
        """End of the last frame, in seconds of the file."""
        return float(self.end * self.time_base)


def scan_packets(
    container: InputContainer, stream: av.VideoStream, stop: float | None
) -> tuple[FrameTable, av.VideoFrame | None]:
    """Reads the packets of a container and decodes only the first frame, from which the size is known.

    If packets have no times, or two have the same, the table is empty: use `scan_frames`.

    Args:
      container: A freshly opened container.
      stream: Video stream of the container.
      stop: Time in seconds after which no frame is needed; None reads the whole file.

    Returns:
      The table, and the first frame or None if nothing could be decoded.
    """
    packets, durations, complete, usable = [], {}, True, True
    if container.format.name == "avi" and stream.codec_context.name in _REORDERING:
        usable = False
    first_frame = None
    try:
        for packet in container.demux(stream):
            if first_frame is None:  # the empty packet at the end of the file flushes what the decoder holds back
                with contextlib.suppress(FFmpegError, EOFError):
                    first_frame = next(iter(packet.decode()), None)
            if not packet.size:
                continue
            usable = usable and packet.pts is not None and packet.pts not in durations
            if not usable and first_frame is not None:
                break
            packets.append((packet.pts, packet.is_keyframe))
            if not packet.is_discard:
                durations[packet.pts] = packet.duration or 0
            if stop is not None and packet.dts is not None and packet.dts * _time_base(stream) > stop:
                complete = False
                break
    except (FFmpegError, OSError):
        pass  # truncated or damaged: what was read is used, and the caller compares its length with the header
    if not usable or not durations:
        return _make_table(stream, container, [], 0), first_frame
    starts = sorted(durations)
    table = _make_table(stream, container, starts, durations[starts[-1]])
    return dataclasses.replace(table, packets=packets, complete=complete), first_frame


def scan_frames(container: InputContainer, stream: av.VideoStream) -> FrameTable:
    """Decodes the whole stream to find which frames it really yields; no frame is kept."""
    starts: list[int] = []
    duration = 0
    for frame in decoded_frames(container, stream):
        duration = frame.duration or _frame_duration(stream)
        time = frame.pts if frame.pts is not None else frame.dts
        starts.append(time if time is not None else (starts[-1] + duration if starts else 0))
    # The decoder yields frames in presentation order. Where their times are not ascending, the times are wrong.
    return _make_table(stream, container, sorted(starts), duration)


def decoded_frames(container: InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Yields all frames that can be decoded, skipping damaged packets."""
    with contextlib.suppress(FFmpegError, OSError):
        for packet in container.demux(stream):
            with contextlib.suppress(InvalidDataError):
                yield from packet.decode()
    with contextlib.suppress(FFmpegError, EOFError):
        yield from stream.codec_context.decode(None)


def packet_ranges(packets: Sequence[tuple[int, bool]], wanted: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the ranges of packets that suffice to decode the frames at the `wanted` presentation times.

    Each range starts with a key frame that is presented no later than the wanted frame, which therefore depends on
    nothing before it. Ranges that are close to each other are joined.

    Args:
      packets: (presentation time, is key frame) of each packet in decoding order.
      wanted: Presentation times of the wanted frames.

    Returns:
      (first, last) packet index of each range, both inclusive, ascending.
    """
    position = {start: index for index, (start, _) in enumerate(packets)}
    keys = [index for index, (_, is_key) in enumerate(packets) if is_key]
    ranges: list[tuple[int, int]] = []
    num_keys_before = 0
    for last, start in sorted((position[start], start) for start in wanted):
        while num_keys_before < len(keys) and keys[num_keys_before] <= last:
            num_keys_before += 1
        first = next((key for key in reversed(keys[:num_keys_before]) if packets[key][0] <= start), 0)
        if ranges and first <= ranges[-1][1] + _MAX_JOINED_GAP:
            ranges[-1] = (ranges[-1][0], max(last, ranges[-1][1]))
        else:
            ranges.append((first, last))
    return ranges


def _make_table(stream: av.VideoStream, container: InputContainer, starts: list[int], last_duration: int) -> FrameTable:
    time_base = _time_base(stream)
    stream_start = stream.start_time if stream.start_time is not None else (starts[0] if starts else 0)
    if container.start_time is not None:
        container_start = Fraction(container.start_time, av.time_base)
    else:
        container_start = stream_start * time_base
    return FrameTable(
        starts=starts,
        end=starts[-1] + (last_duration or _frame_duration(stream)) if starts else 0,
        time_base=time_base,
        rate=float(stream.average_rate or stream.guessed_rate or 1),
        stream_start=stream_start * time_base,
        container_start=min(container_start, stream_start * time_base),
        header_seconds=float((stream_start + stream.duration) * time_base) if stream.duration else None,
    )


def _frame_duration(stream: av.VideoStream) -> int:
    """Returns the average duration of a frame in `time_base` units."""
    rate = stream.average_rate or stream.guessed_rate
    return round(1 / (rate * _time_base(stream))) if rate else 0


def _time_base(stream: av.VideoStream) -> Fraction:
    """Returns the length of a time unit in seconds; FFmpeg sets one for every stream that it reads."""
    return stream.time_base or Fraction(1)
