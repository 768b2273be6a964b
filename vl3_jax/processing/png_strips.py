"""Decodes very large PNG files at a fraction of their size, without holding all pixels in memory.

The compressed rows are inflated as a stream. A few hundred rows at a time form a small PNG, which Pillow decodes. Row
filters refer to the row above, so each strip starts with the last decoded row of the previous strip, stored
unfiltered. Each strip is averaged down at once.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image

from vl3_jax.processing import png_chunks, rgb_pixels

_MODES = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}  # by PNG colour type, at 8 bits for each letter
_STRIP_BYTES = 2**24
_MAX_STRIP_BYTES = 2**27
_READ_BYTES = 2**20


def readable(file: BinaryIO, factor: int) -> bool:
    """Returns whether the PNG in `file` has 8-bit channels, no interlacing and rows of which `factor` fit memory."""
    header = png_chunks.data_of(file, b"IHDR")
    if header is None or header[8] != 8 or header[12] != 0 or header[9] not in _MODES:
        return False
    return _row_bytes(header) * factor <= _MAX_STRIP_BYTES


def reduced(file: BinaryIO, factor: int) -> tuple[Image.Image, str | None]:
    """Decodes the PNG in `file` to RGB, averaged over factor x factor pixels.

    Returns:
      The image, and the remark of `rgb_pixels.to_rgb`.

    Raises:
      ValueError: The data ends early or is damaged.
    """
    header = png_chunks.data_of(file, b"IHDR")
    if header is None:
        raise ValueError("the header is missing")
    width, height = struct.unpack(">II", header[:8])
    colours = [(kind, data) for kind in (b"PLTE", b"tRNS") if (data := png_chunks.data_of(file, kind)) is not None]
    row_bytes = _row_bytes(header)
    rows_per_strip = max(1, _STRIP_BYTES // (row_bytes * factor)) * factor
    result = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    row_above, remark, done = None, None, 0
    for rows in _strips(file, row_bytes, rows_per_strip, height):
        strip = _decode_strip(rows, row_above, header, colours, len(rows) // row_bytes)
        row_above = np.asarray(strip)[-1].tobytes()
        rgb, strip_remark = rgb_pixels.to_rgb(strip)
        remark = remark or strip_remark
        result.paste(rgb.reduce(factor), (0, done // factor))
        done += len(rows) // row_bytes
    if done < height:
        raise ValueError(f"only {done} of {height} rows are present")
    return result, remark


def _row_bytes(header: bytes) -> int:
    """Returns the bytes of a row with the byte that names its filter."""
    return 1 + int.from_bytes(header[:4]) * len(_MODES[header[9]])


def _decode_strip(
    rows: bytes, row_above: bytes | None, header: bytes, colours: list[tuple[bytes, bytes]], count: int
) -> Image.Image:
    prefix = b"" if row_above is None else b"\0" + row_above
    size = header[:4] + struct.pack(">I", count + bool(prefix))
    chunks = [(b"IHDR", size + header[8:]), *colours, (b"IDAT", zlib.compress(prefix + rows, 0)), (b"IEND", b"")]
    strip = Image.open(io.BytesIO(png_chunks.MAGIC + b"".join(png_chunks.encode(*chunk) for chunk in chunks)))
    strip.load()
    if strip.mode != _MODES[header[9]]:
        raise ValueError(f"unexpected pixel layout {strip.mode}")
    return strip.crop((0, bool(prefix), *strip.size))


def _strips(file: BinaryIO, row_bytes: int, rows: int, height: int) -> Iterator[bytes]:
    """Yields the filtered rows of the file, `rows` at a time."""
    inflater, pending, remaining = zlib.decompressobj(), bytearray(), height
    for data in _idat(file):
        while data and remaining:
            pending += inflater.decompress(data, _STRIP_BYTES)
            data = inflater.unconsumed_tail
            while remaining and len(pending) >= row_bytes * min(rows, remaining):
                end = row_bytes * min(rows, remaining)
                yield bytes(pending[:end])
                del pending[:end]
                remaining -= end // row_bytes


def _idat(file: BinaryIO) -> Iterator[bytes]:
    for kind, _, length in png_chunks.chunks(file):
        while kind == b"IDAT" and length:
            data = file.read(min(length, _READ_BYTES))
            if not data:
                return
            length -= len(data)
            yield data
