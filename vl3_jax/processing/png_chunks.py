"""The chunks of a PNG file: lists them, writes one, and shows a file with only some of them."""

import bisect
import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

MAGIC = b"\x89PNG\r\n\x1a\n"
PIXELS = frozenset([b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"])  # and frames
_FRAME = 12  # bytes of length, kind and checksum


class Chunk(NamedTuple):
    """A chunk: its kind, the position of its data in the file, and their length."""

    kind: bytes
    start: int
    length: int


def chunks(file: BinaryIO) -> Iterator[Chunk]:
    """Yields each chunk, with the file positioned at its data."""
    position = len(MAGIC)
    while True:
        file.seek(position)
        head = file.read(8)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head)
        yield Chunk(kind, position + 8, length)
        if kind == b"IEND":
            return
        position += _FRAME + length


def read(file: BinaryIO, chunk: Chunk, count: int) -> bytes:
    """Returns the data of a chunk, at most `count` bytes of them."""
    file.seek(chunk.start)
    return file.read(min(chunk.length, count))


def data_of(file: BinaryIO, wanted: bytes) -> bytes | None:
    """Returns the data of the first chunk of the wanted kind, or None."""
    return next((file.read(chunk.length) for chunk in chunks(file) if chunk.kind == wanted), None)


def encode(kind: bytes, data: bytes) -> bytes:
    """Returns a chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def view(file: BinaryIO, shown: Sequence[Chunk]) -> BinaryIO:
    """Returns the file as if it held only these of its chunks."""
    return io.BufferedReader(_ChunkView(file, shown))


class _ChunkView(io.RawIOBase):
    """The bytes of some chunks of a PNG file, behind its signature."""

    def __init__(self, file: BinaryIO, shown: Sequence[Chunk]):
        self._file, self._position = file, 0
        self._offsets, self._starts, self._size = [0], [0], len(MAGIC)  # of each part: here, and in the file
        for _, start, length in shown:
            self._offsets.append(self._size)
            self._starts.append(start - 8)
            self._size += _FRAME + length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = origin + offset
        return self._position

    def readinto(self, buffer) -> int:
        part = bisect.bisect_right(self._offsets, self._position) - 1
        end = self._offsets[part + 1] if part + 1 < len(self._offsets) else self._size
        self._file.seek(self._starts[part] + self._position - self._offsets[part])
        data = self._file.read(max(min(len(buffer), end - self._position), 0))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
