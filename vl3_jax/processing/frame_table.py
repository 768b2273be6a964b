"""When each frame of a video file is shown, found out without decoding it where the container tells."""

import contextlib
import dataclasses
from collections.abc import Sequence
from fractions import Fraction

import av

_REORDERING = ("h264", "hevc")  # AVI knows no presentation times, so theirs are made up
_FAR = 16  # packets; shorter stretches are decoded through rather than skipped


@dataclasses.dataclass(frozen=True)
class FrameTable:
    """The frames of a video stream in presentation order.

    Attributes:
      starts: presentation time of each, in `unit`.
      end: when the last one ends.
      unit: seconds.
      rate: average frames per second, as the container states it.
      stream_start: when the stream begins, seconds.
      container_start: when the file begins (its sound may begin earlier), seconds.
      packets: in decoding order, (presentation time, is key frame); None where only decoding tells the times.
      complete: whether the file was read to its end.
      promised_seconds: length that the header states, if it does.
    """

    starts: Sequence[int]
    end: int
    unit: Fraction
    rate: float
    stream_start: Fraction
    container_start: Fraction
    packets: list[tuple[int, bool]] | None = None
    complete: bool = True
    promised_seconds: float | None = None

    @property
    def seconds(self) -> float:
        """When the last frame ends, in seconds of the file."""
        return float(self.end * self.unit)


def scan_packets(
    container: av.container.InputContainer, stream: av.VideoStream, stop: float | None
) -> tuple[FrameTable, av.VideoFrame | None]:
    """Reads the container's packets, decoding only the first frame, which tells the size.

    If packets lack times, or two share one, the table is empty: use `scan_frames`.

    Args:
      container: freshly opened.
      stream: of the container.
      stop: seconds after which no frame matters; None reads all.

    Returns:
      The table, and the first frame, None if nothing could be decoded.
    """
    packets, durations, complete, usable = [], {}, True, True
    if container.format.name == "avi" and stream.codec_context.name in _REORDERING:
        usable = False
    first = None
    try:
        for packet in container.demux(stream):
            if first is None:  # at the end of the file an empty packet brings out what the decoder holds back
                with contextlib.suppress(av.FFmpegError, EOFError):
                    first = next(iter(packet.decode()), None)
            if not packet.size:
                continue
            usable = usable and packet.pts is not None and packet.pts not in durations
            if not usable and first is not None:
                break
            packets.append((packet.pts, packet.is_keyframe))
            if not packet.is_discard:
                durations[packet.pts] = packet.duration or 0
            if stop is not None and packet.dts is not None and packet.dts * stream.time_base > stop:
                complete = False
                break
    except (av.FFmpegError, OSError):
        pass  # cut off or damaged: what came before stands, and the shortfall is noticed by its length
    if not usable or not durations:
        return _table(stream, container, [], 0), first
    starts = sorted(durations)
    table = _table(stream, container, starts, durations[starts[-1]])
    return dataclasses.replace(table, packets=packets, complete=complete), first


def scan_frames(container: av.container.InputContainer, stream: av.VideoStream) -> FrameTable:
    """Decodes the whole stream to learn which frames it really yields, keeping none."""
    starts: list[int] = []
    duration = 0
    for frame in decoded_frames(container, stream):
        duration = frame.duration or _frame_length(stream)
        known = frame.pts if frame.pts is not None else frame.dts
        starts.append(known if known is not None else (starts[-1] + duration if starts else 0))
    # Frames come out in the order they are shown; where their times do not, the times are the wrong ones.
    return _table(stream, container, sorted(starts), duration)


def decoded_frames(container: av.container.InputContainer, stream: av.VideoStream):
    """All frames that can be decoded, past damaged packets."""
    try:
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except av.InvalidDataError:
                continue
    except (av.FFmpegError, OSError):
        pass
    try:
        yield from stream.codec_context.decode(None)
    except (av.FFmpegError, EOFError):
        return


def runs(packets: Sequence[tuple[int, bool]], wanted: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches of packets, (first, last), that suffice to decode the frames shown at the `wanted` times.

    Each begins with a key frame that is shown no later than the wanted frame, which therefore depends on
    nothing before it. Stretches close to each other are joined.
    """
    position = {start: index for index, (start, _) in enumerate(packets)}
    keys = [index for index, (_, is_key) in enumerate(packets) if is_key]
    joined: list[tuple[int, int]] = []
    passed = 0
    for last, start in sorted((position[start], start) for start in wanted):
        while passed < len(keys) and keys[passed] <= last:
            passed += 1
        first = next((key for key in reversed(keys[:passed]) if packets[key][0] <= start), 0)
        if joined and first <= joined[-1][1] + _FAR:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return joined


def _table(
    stream: av.VideoStream, container: av.container.InputContainer, starts: list[int], last_duration: int
) -> FrameTable:
    unit = stream.time_base
    begins = stream.start_time if stream.start_time is not None else (starts[0] if starts else 0)
    file_begins = Fraction(container.start_time, av.time_base) if container.start_time is not None else begins * unit
    return FrameTable(
        starts=starts,
        end=starts[-1] + (last_duration or _frame_length(stream)) if starts else 0,
        unit=unit,
        rate=float(stream.average_rate or stream.guessed_rate or 1),
        stream_start=begins * unit,
        container_start=min(file_begins, begins * unit),
        promised_seconds=float((begins + stream.duration) * unit) if stream.duration else None,
    )


def _frame_length(stream: av.VideoStream) -> int:
    rate = stream.average_rate or stream.guessed_rate
    return round(1 / (rate * stream.time_base)) if rate else 0
