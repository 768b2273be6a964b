"""Reads annotation files, JSON lines or one JSON list, record by record through byte offsets."""

import mmap
import re
from typing import Any

import numpy as np

from data_pipelines.parallel_map import chunk_ranges
from data_pipelines.sources.base import ByteFile, RecordSource, parse_json
from vl3_jax.errors import InputError

_CHUNK = 2**24
_BOM = b"\xef\xbb\xbf"
# Strings are matched as a whole, so that brackets inside them do not count. The last one may be cut off.
_STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\Z)|[\[\]{},]', re.DOTALL)


class AnnotationFile(RecordSource):
    """One file in the official format; a first character "[" means a JSON list, any other JSON lines."""

    def __init__(self, path: str):
        super().__init__(path)
        self._file = ByteFile(path)
        size = self._size()
        start = self._first_character(size)
        self._is_list = size > start and self._file.read(start, start + 1) == b"["
        if self._is_list:
            self._starts, self._stops = _list_elements(self._content(), start)
            self._lines = None
        else:
            self._starts, self._stops, self._lines = _lines(self._file, size, start)

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, index: int) -> str:
        if self._lines is not None:
            line = int(self._lines[index]) + 1
        else:
            ranges = chunk_ranges(int(self._starts[index]), _CHUNK)
            line = 1 + sum(self._file.read(*chunk).count(b"\n") for chunk in ranges)
        return f"{self.path}, line {line}"

    def read(self, index: int) -> Any:
        return parse_json(self._file.read(int(self._starts[index]), int(self._stops[index])), "the record")

    def fingerprint(self) -> list:
        return ["annotations", len(self), *self._file.fingerprint()]

    def _size(self) -> int:
        try:
            return self._file.size
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror or 'cannot be read'}; check the annotation file") from None

    def _first_character(self, size: int) -> int:
        head = self._file.read(0, min(size, 4096))
        position = len(_BOM) if head.startswith(_BOM) else 0
        return position + len(head[position:]) - len(head[position:].lstrip())

    def _content(self):
        if "://" in self.path:
            return self._file.read(0, self._file.size)
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _lines(file: ByteFile, size: int, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns starts, stops and numbers (from 0) of the lines that are not blank."""
    ends = [np.empty(0, np.int64)]
    for start, stop in chunk_ranges(size, _CHUNK):
        chunk = np.frombuffer(file.read(start, stop), np.uint8)
        ends.append(np.flatnonzero(chunk == ord("\n")) + start)
    stops = np.concatenate(ends)
    if size and (not len(stops) or stops[-1] < size - 1):
        stops = np.append(stops, size)
    starts = np.concatenate([[0], stops[:-1] + 1]).astype(np.int64)[: len(stops)]
    # Only lines shorter than any record are read; even in files of millions there are few.
    blank = [i for i in np.flatnonzero(stops - starts < 8) if not file.read(int(starts[i]), int(stops[i])).strip()]
    keep = np.ones(len(starts), bool)
    keep[blank] = False
    starts[:1] = np.minimum(np.maximum(starts[:1], first), stops[:1])
    return starts[keep], stops[keep], np.flatnonzero(keep).astype(np.int32)


def _list_elements(content, opening: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the byte ranges between the commas of the outer list; what follows damage becomes one bad record."""
    starts, stops = [], []
    depth, start = 0, opening + 1
    end = None
    for match in _STRUCTURE.finditer(content, opening):
        character = match.group()
        if character in (b"{", b"["):
            depth += 1
        elif character in (b"}", b"]"):
            depth -= 1
            if depth == 0:
                end = match.start()
                break
        elif character == b"," and depth == 1:
            starts.append(start)
            stops.append(match.start())
            start = match.end()
    end = len(content) if end is None else end
    if starts or content[start:end].strip():
        starts.append(start)
        stops.append(end)
    trimmed = [_trim(content, *bounds) for bounds in zip(starts, stops, strict=True)]
    return np.array([t[0] for t in trimmed], np.int64), np.array([t[1] for t in trimmed], np.int64)


def _trim(content, start: int, stop: int) -> tuple[int, int]:
    """Skips white space before the element, so that its line number is right."""
    element = content[start:stop]
    return start + len(element) - len(element.lstrip()), stop
