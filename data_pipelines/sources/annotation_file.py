"""Reads annotation files, JSON lines or one JSON list, record by record through byte offsets."""

import itertools
import mmap
import re
from typing import Any

import numpy as np

from data_pipelines.parallel_map import chunk_ranges
from data_pipelines.sample_errors import NOT_JSON, BadSampleError
from data_pipelines.sources.base import ByteFile, RecordSource, parse_json

_CHUNK = 2**24
_BOM = b"\xef\xbb\xbf"
# Strings are matched as a whole, so that brackets inside them do not count. The last one may be cut off.
_STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\Z)|[\[\]{},]', re.DOTALL)


class AnnotationFile(RecordSource):
    """One file; a first character "[" means JSON lists, most often one, and any other JSON lines."""

    KIND = "annotations"

    def __init__(self, path: str):
        super().__init__(path)
        self._file = ByteFile(path)
        size = self._file.size
        head = self._file.read(0, min(size, 4096))
        content = head.removeprefix(_BOM).lstrip()
        start = len(head) - len(content)
        is_list = content.startswith(b"[")
        records = _list_elements(self._content(), start) if is_list else _lines(self._file, size, start)
        self._starts, self._stops, self._lines = records

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, index: int) -> str:
        return f"{self.path}, line {self._lines[index] + 1}"

    def read(self, index: int) -> Any:
        content = self._file.read(int(self._starts[index]), int(self._stops[index]))
        if not content.strip():
            raise BadSampleError(
                NOT_JSON, "no record where one is due: a blank line, a comma too many, or a list that is cut off"
            )
        return parse_json(content, "the record")

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


def _list_elements(content, opening: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns starts, stops and lines (from 0) of what is between the commas of the outer lists.

    What follows damage becomes one bad record. So does what follows a list, unless it is another one; the end of a list
    that is cut off is an empty record.
    """
    bounds, depth, start, end = [], 0, opening, len(content)
    for match in _STRUCTURE.finditer(content, opening):
        character = match.group()
        if depth == 0:  # before a list
            if character != b"[" or content[start : match.start()].strip():
                break
            start, depth, first = match.end(), 1, len(bounds)
        elif character in (b"{", b"["):
            depth += 1
        elif character == b"," and depth == 1:
            bounds.append((start, match.start()))
            start = match.end()
        elif character in (b"}", b"]"):
            depth -= 1
            if depth == 0:
                if len(bounds) > first or content[start : match.start()].strip():
                    bounds.append((start, match.start()))
                start = match.end()
    if content[start:end].strip():
        bounds.append((start, end))
    if depth == 1:
        bounds.append((end, end))
    # White space before an element is skipped, so that its line number is right.
    starts = [stop - len(content[start:stop].lstrip()) for start, stop in bounds]
    lines = np.cumsum([content[a:b].count(b"\n") for a, b in itertools.pairwise([0, *starts])], dtype=np.int32)
    return np.array(starts, np.int64), np.array([stop for _, stop in bounds], np.int64), lines
