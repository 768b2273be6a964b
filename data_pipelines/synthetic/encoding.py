"""Pixels as files that come back to the last bit: PNG pictures, and QuickTime clips of one frame a second."""

import io
from fractions import Fraction

import av
import numpy as np
from PIL import Image

_SECOND = Fraction(1)


def encode_image(pixels: np.ndarray) -> bytes:
    """[h, w, 3] uint8 -> a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def encode_video(frames: np.ndarray, codec: str = "qtrle") -> bytes:
    """[t, h, w, 3] uint8 -> a QuickTime file (.mov), frame k shown from k to k + 1 s.

    Args:
      frames: of the clip.
      codec: "qtrle" (run lengths) or "rawvideo" (twice as fast, larger); both are lossless in RGB and part of every
        build of FFmpeg.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mov") as container:
        stream = container.add_stream(codec, rate=1)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.time_base, stream.thread_type = "rgb24", _SECOND, "NONE"
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
            frame.pts, frame.time_base = number, _SECOND
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()
