"""The chunks of a PNG file: finds one, writes one, and hides those that do not make pixels."""

import bisect
import io
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

MAGIC = b"\x89PNG\r\n\x1a\n"
_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"}
_METADATA = {b"tEXt", b"zTXt", b"iTXt", b"eXIf"}
_MAX_METADATA = 2**20  # bytes of a chunk; more is no description of a picture


def data_of(file: BinaryIO, wanted: bytes) -> bytes | None:
    """Returns the data of the first chunk of the wanted kind, at most a megabyte; the file's position is restored."""
    before = file.tell()
    try:
        return next((file.read(min(length, _MAX_METADATA)) for kind, length in chunks(file) if kind == wanted), None)
    finally:
        file.seek(before)


def chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yields the kind and length of each chunk, with the file positioned at the chunk's data."""
    position = len(MAGIC)
    while True:
        file.seek(position)
        head = file.read(8)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head)
        yield kind, length
        if kind == b"IEND":
            return
        position += 12 + length


def chunk(kind: bytes, data: bytes) -> bytes:
    """Returns a chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def pixels_only(file: BinaryIO) -> BinaryIO:
    """Returns a view of the file without the chunks that do not make pixels, so that their damage or size is harmless."""
    return io.BufferedReader(_ChunkView(file, _PIXELS))


def with_metadata(file: BinaryIO) -> BinaryIO:
    """Returns a view of the file with the text and EXIF of up to a megabyte each that precede its pixels."""
    return io.BufferedReader(_ChunkView(file, _PIXELS, _METADATA))


class _ChunkView(io.RawIOBase):
    """The bytes of some chunks of a PNG file, as if the file held no others."""

    def __init__(self, file: BinaryIO, kinds: set[bytes], short_kinds: set[bytes] = frozenset()):
        self._file, self._position = file, 0
        self._offsets, self._starts, self._size = [0], [0], len(MAGIC)  # of each chunk: here, and in the file
        for kind, length in chunks(file):
            if kind in kinds or (kind in short_kinds and length <= _MAX_METADATA):
                self._offsets.append(self._size)
                self._starts.append(file.tell() - 8)
                self._size += 12 + length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = origin + offset
        return self._position

    def readinto(self, buffer) -> int:
        index = bisect.bisect_right(self._offsets, self._position) - 1
        end = self._offsets[index + 1] if index + 1 < len(self._offsets) else self._size
        self._file.seek(self._starts[index] + self._position - self._offsets[index])
        data = self._file.read(min(len(buffer), end - self._position)) if self._position < end else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
