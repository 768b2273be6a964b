"""Lossless encoding of pixels: PNG images, and QuickTime videos of one frame per second."""

import io
from fractions import Fraction

import av
import numpy as np
from PIL import Image

_SECOND = Fraction(1)


def encode_image(pixels: np.ndarray) -> bytes:
    """Encodes [h, w, 3] uint8 as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def encode_video(frames: np.ndarray, codec: str = "qtrle") -> bytes:
    """Encodes frames as a QuickTime file (.mov) in which frame k lasts from second k to second k + 1.

    Args:
      frames: [t, h, w, 3] uint8.
      codec: "qtrle" (run lengths) or "rawvideo" (twice as fast, larger files). Both are lossless in RGB and part of
        every build of FFmpeg.

    Returns:
      The content of the file.
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
