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

_MAGIC = b"\x89PNG\r\n\x1a\n"
_MODES = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}  # by PNG colour type, at 8 bits for each letter
_STRIP_BYTES = 2**24
_READ_BYTES = 2**20


def readable(file: BinaryIO) -> bool:
    """Returns whether the PNG in `file` has 8-bit channels and is not interlaced."""
    header = chunk_data(file, b"IHDR")
    return header is not None and header[8] == 8 and header[12] == 0


def reduced(file: BinaryIO, factor: int) -> Image.Image:
    """Decodes the PNG in `file` to RGB, averaged over factor x factor pixels.

    Raises:
      ValueError: The data ends early or is damaged.
    """
    header = chunk_data(file, b"IHDR")
    if header is None:
        raise ValueError("the header is missing")
    width, height, _, colour = struct.unpack(">IIBB", header[:10])
    palette = chunk_data(file, b"PLTE") if colour == 3 else None
    row_bytes = 1 + width * len(_MODES[colour])
    rows_per_strip = max(1, _STRIP_BYTES // (row_bytes * factor)) * factor
    result = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    row_above, done = None, 0
    for rows in _strips(file, row_bytes, rows_per_strip, height):
        strip = _decode_strip(rows, row_above, header, colour, palette, len(rows) // row_bytes)
        row_above = np.asarray(strip)[-1].tobytes()
        result.paste(strip.convert("RGB").reduce(factor), (0, done // factor))
        done += len(rows) // row_bytes
    if done < height:
        raise ValueError(f"only {done} of {height} rows are present")
    return result


def _decode_strip(
    rows: bytes, row_above: bytes | None, header: bytes, colour: int, palette: bytes | None, count: int
) -> Image.Image:
    prefix = b"" if row_above is None else b"\0" + row_above
    size = header[:4] + struct.pack(">I", count + bool(prefix))
    chunks = [(b"IHDR", size + header[8:])]
    if palette is not None:
        chunks.append((b"PLTE", palette))
    chunks += [(b"IDAT", zlib.compress(prefix + rows, 0)), (b"IEND", b"")]
    strip = Image.open(io.BytesIO(_MAGIC + b"".join(_chunk(*chunk) for chunk in chunks)))
    strip.load()
    if strip.mode != _MODES[colour]:
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
    for kind, length in _chunks(file):
        while kind == b"IDAT" and length:
            data = file.read(min(length, _READ_BYTES))
            if not data:
                return
            length -= len(data)
            yield data


def chunk_data(file: BinaryIO, wanted: bytes) -> bytes | None:
    """Returns the data of the first chunk of the wanted kind, or None; the position of the file is restored."""
    before = file.tell()
    try:
        return next((file.read(length) for kind, length in _chunks(file) if kind == wanted), None)
    finally:
        file.seek(before)


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yields the kind and length of each chunk, with the file positioned at the chunk's data."""
    position = len(_MAGIC)
    while True:
        file.seek(position)
        head = file.read(8)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head)
        yield kind, length
        position += 12 + length


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
