"""Clips of frames that show their own number and which way up they are, so that a test reads from pixels what it got.

Twelve vertical bars across the middle third are the bits of the number, the highest at the left, white for 1. Three
corners are red (top left), green (top right) and blue (bottom left).
"""

import pathlib
import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction

import av
import numpy as np

from vl3_jax.processing.video_reader import PlanChangedError

CORNERS = ("red", "green", "blue")
_BITS = 12


def clip_frame(number: int, height: int = 80, width: int = 120) -> np.ndarray:
    """Returns the frame of a number, [h, w, 3] uint8."""
    frame = np.full((height, width, 3), 128, np.uint8)
    for bit in range(_BITS):
        bar = slice(width * bit // _BITS, width * (bit + 1) // _BITS)
        frame[height // 3 : 2 * height // 3, bar] = 255 * (number >> (_BITS - 1 - bit) & 1)
    edge = height // 6
    for channel, corner in enumerate((frame[:edge, :edge], frame[:edge, -edge:], frame[-edge:, :edge])):
        corner[:] = 0
        corner[..., channel] = 255
    return frame


def shown_number(frame: np.ndarray) -> int:
    """Returns the number that an upright frame shows."""
    height, width, _ = frame.shape
    bars = frame[height // 3 + 2 : 2 * height // 3 - 2].mean((0, 2))
    centres = [width * (2 * bit + 1) // (2 * _BITS) for bit in range(_BITS)]
    return sum(
        int(bars[centre - 1 : centre + 2].mean() > 128) << (_BITS - 1 - bit) for bit, centre in enumerate(centres)
    )


def corners(frame: np.ndarray) -> list[str]:
    """Returns the colours top left, top right, bottom left, bottom right; "" is none of the three."""
    found = []
    for pixel in (frame[2, 2], frame[2, -3], frame[-3, 2], frame[-3, -3]):
        channel = int(np.argmax(pixel))
        found.append(CORNERS[channel] if int(pixel[channel]) - int(np.sort(pixel)[1]) > 100 else "")
    return found


def read_frames(video) -> list[np.ndarray]:
    """Decodes a video, once more where damage changes the plan."""
    try:
        return [np.asarray(frame) for frame in video.frames()]
    except PlanChangedError:
        return [np.asarray(frame) for frame in video.frames()]


def read_numbers(video) -> list[int]:
    """Returns the numbers that the selected frames of a video show."""
    return [shown_number(frame) for frame in read_frames(video)]


def encode(
    numbers: Iterable[int], codec: str = "libx264", size: tuple[int, int] = (80, 120), rate: int = 25, **options
) -> list[av.Packet]:
    """Encodes the frames of these numbers, with key frames a second apart and times number / rate."""
    context = av.CodecContext.create(codec, "w")
    context.height, context.width, context.pix_fmt = *size, "yuv420p"
    context.time_base, context.framerate, context.gop_size = Fraction(1, rate), Fraction(rate), rate
    context.options = {key: str(value) for key, value in options.items()}
    packets = []
    for number in numbers:
        frame = av.VideoFrame.from_ndarray(clip_frame(number, *size))
        frame.pts, frame.time_base = number, context.time_base
        packets += context.encode(frame)
    return packets + context.encode(None)


def mux(
    path: pathlib.Path,
    packets: Sequence[av.Packet],
    codec: str = "libx264",
    size: tuple[int, int] = (80, 120),
    **options,
) -> None:
    """Writes packets to a container; the options are those of FFmpeg's muxer."""
    with av.open(str(path), "w", options={key: str(value) for key, value in options.items()}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for packet in packets:
            packet.stream = stream
            container.mux(packet)


def set_display_matrix(path: pathlib.Path, a: float, b: float, c: float, d: float) -> None:
    """Overwrites the display matrix of an MP4's first track, which shows the stored (x, y) at (ax + cy, bx + dy)."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40
    fixed = [round(value * 65536) for value in (a, b, 0, c, d, 0, 0, 0)]
    content[start : start + 36] = struct.pack(">9i", *fixed, 1 << 30)
    path.write_bytes(content)
