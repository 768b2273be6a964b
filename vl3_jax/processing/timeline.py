"""One timeline for a video file: times that go on where the clock of the container restarts or jumps."""

from fractions import Fraction

import av
from av.container import InputContainer
from av.format import Flags

_MAX_JUMP = 10  # seconds; a longer gap is a jump of the clock
_MAX_BACKWARD_STEP = Fraction(1, 10)  # of a second; a longer one is a restart


def clock_may_jump(container: InputContainer) -> bool:
    """Returns whether the format allows its clock to jump: transport streams and others that are sent and joined."""
    return bool(container.format.flags & Flags.ts_discont.value)


def time_base(stream: av.VideoStream) -> Fraction:
    """Returns the length of a time unit in seconds; FFmpeg sets one for every stream that it reads."""
    return stream.time_base or Fraction(1)


def frame_duration(stream: av.VideoStream) -> int:
    """Returns the average duration of a frame in time units, or 0 where no rate is known."""
    rate = stream.average_rate or stream.guessed_rate
    return round(1 / (rate * time_base(stream))) if rate else 0


class Timeline:
    """Moves the times of packets, in decoding order, so that they go on across restarts and jumps.

    Where the format allows jumps, the rule is that of the `ffmpeg` program: a packet that is decoded over 10 s away
    from the time predicted, or over 0.1 s before the last one, is decoded at the time predicted, and all later ones
    move with it. In other formats gaps are believed, but a key frame that goes back to the first one begins where the
    frames before it end.

    Attributes:
      moved: Whether any time was moved.
    """

    def __init__(self, container: InputContainer, stream: av.VideoStream):
        self.moved = False
        self._may_jump = clock_may_jump(container)
        self._has_clock = not container.format.flags & Flags.no_timestamps.value
        unit = time_base(stream)
        self._max_jump, self._max_step = _MAX_JUMP / unit, _MAX_BACKWARD_STEP / unit
        self._usual_duration = frame_duration(stream)
        self._shift = 0
        # Time of decoding of the last packet, and that predicted for the next.
        self._last: int | None = None
        self._next: int | None = None
        # Presentation time of the first key frame since the clock began, and the end of the last frame.
        self._first_key: int | None = None
        self._end = 0

    def place(self, packet: av.Packet) -> None:
        """Moves the times of the next packet."""
        if not self._has_clock:
            packet.pts = packet.dts = None
        pts, dts = packet.pts, packet.dts
        self._shift += self._correction(packet)
        if self._shift:
            self.moved = True
            packet.pts = None if pts is None else pts + self._shift
            packet.dts = None if dts is None else dts + self._shift
        self._remember(packet)

    def _correction(self, packet: av.Packet) -> int:
        if self._may_jump:
            if packet.dts is None or self._last is None or self._next is None:
                return 0
            dts = packet.dts + self._shift
            is_jump = abs(dts - self._next) > self._max_jump or dts + self._max_step < self._last
            return self._next - dts if is_jump else 0
        if packet.pts is None or self._first_key is None or not packet.is_keyframe or packet.is_discard:
            return 0
        pts = packet.pts + self._shift
        if pts > self._first_key:
            return 0
        self._first_key = self._end
        return self._end - pts

    def _remember(self, packet: av.Packet) -> None:
        duration = packet.duration or self._usual_duration
        self._last = packet.dts if packet.dts is not None else self._next
        self._next = None if self._last is None else self._last + duration
        if packet.pts is not None and not packet.is_discard:
            if self._first_key is None and packet.is_keyframe:
                self._first_key = self._end = packet.pts
            self._end = max(packet.pts + duration, self._end)
