"""Paths of the test media, and small videos that tests generate."""

import json
import pathlib
from fractions import Fraction

import av
import numpy as np

DATA = pathlib.Path(__file__).parent.parent / "data"
MEDIA = DATA / "media"
TOKENIZER = DATA / "tokenizer"
AWKWARD = DATA / "awkward"
EXPECTED = json.loads((MEDIA / "expected_sampling.json").read_text())


def all_media() -> list[pathlib.Path]:
    """Returns the paths of all images and videos of the test data, sorted."""
    return sorted(path for path in MEDIA.glob("*/*") if path.is_file())


def numbered_frame(number: int, height: int, width: int) -> np.ndarray:
    """Returns a frame that encodes its number in steps of 20 grey levels: tens in the left half, units in the right."""
    frame = np.empty((height, width, 3), np.uint8)
    frame[:, : width // 2], frame[:, width // 2 :] = 20 + number // 10 % 10 * 20, 20 + number % 10 * 20
    return frame


def read_number(frame: np.ndarray) -> int:
    """Returns the number of a frame from `numbered_frame`, modulo 100."""
    halves = np.split(frame.astype(float), 2, axis=1)
    tens, units = (round((half.mean() - 20) / 20) for half in halves)
    return tens * 10 + units


def write_video(path, times_ms, height=64, width=96, codec="mpeg4", pixels="yuv420p", gop=12, **options) -> None:
    """Writes a video of numbered frames.

    Args:
      path: Output file.
      times_ms: Presentation time of each frame in milliseconds.
      height: Height in pixels.
      width: Width in pixels.
      codec: Name of the FFmpeg encoder.
      pixels: Pixel format.
      gop: Distance of key frames.
      **options: Options of the encoder.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={key: str(value) for key, value in options.items()})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for number, time in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, height, width))
            frame.pts, frame.time_base = time, stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_audio(path) -> None:
    """Writes a silent audio file without a video track."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        for _ in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate = 16_000
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
