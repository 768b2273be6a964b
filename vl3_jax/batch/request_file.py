"""A file of requests, one JSON object a line, of which only an index is in memory."""

import array
import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from vl3_jax.errors import InputError, RunError, printable, repr_of
from vl3_jax.json_file import unique_keys
from vl3_jax.storage.shards import Shard

MOST_BYTES = 2**28  # of a line, which may hold images and videos
_KEYS = ("custom_id", "method", "url", "body")
_URL = "/v1/chat/completions"
ID_PREFIX = "batch_req_"
_IDENTIFIER = re.compile(rf"{ID_PREFIX}([0-9a-f]{{16}})")


@dataclasses.dataclass(frozen=True)
class RequestLine:
    """A line of a file of requests.

    Attributes:
      number: Its number in the file, from 1.
      content: Its content; empty if it is longer than `MOST_BYTES`.
      key: 64 bits that stand for the line: for its content, and for its number if it cannot be asked.
      duplicate_of: Number of the first line with the same `custom_id`; None if it is this one.
    """

    number: int
    content: bytes
    key: int
    duplicate_of: int | None = None

    @property
    def id(self) -> str:
        """What the answer is known by, and an interrupted run recognises it by."""
        return f"{ID_PREFIX}{self.key:016x}"


def key_of(identifier: Any) -> int | None:
    """Returns the key of a line from the `id` of its answer; None if it is none."""
    found = _IDENTIFIER.fullmatch(identifier) if isinstance(identifier, str) else None
    return int(found[1], 16) if found else None


def parse_line(content: bytes) -> dict[str, Any]:
    """Returns the object of a line.

    Raises:
      InputError: It is not JSON, or no object.
    """
    if not content:
        raise InputError(f"the line has more than {MOST_BYTES:,} bytes; give large media as files")
    try:
        value = json.loads(content, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON ({error.msg} at character {error.pos + 1}); correct the line") from None
    except UnicodeDecodeError:
        raise InputError("not UTF-8 text; correct the line") from None
    except (ValueError, RecursionError) as error:  # a key twice, a number of thousands of digits, endless nesting
        raise InputError(f"cannot be read as JSON ({error}); correct the line") from None
    if not isinstance(value, dict):
        raise InputError(f'the line is {printable(repr_of(value))}; give {{"custom_id": "...", "body": {{...}}}}')
    return value


def check_envelope(request: dict[str, Any]) -> None:
    """Checks what is around the body of a request.

    Raises:
      InputError: A key is missing, not known, or has a value that is not supported.
    """
    for key in request:
        if key not in _KEYS:
            raise InputError(f"unknown key {printable(repr_of(key))}; known are {', '.join(_KEYS)}")
    if not is_name(request.get("custom_id")):
        raise InputError(f"custom_id is {printable(repr_of(request.get('custom_id')))}; give a text of its own")
    for key, expected in (("method", "POST"), ("url", _URL)):
        if request.get(key, expected) != expected:
            raise InputError(f"{key} is {printable(repr_of(request[key]))}; give {expected}, or leave it out")
    if "body" not in request:
        raise InputError("the request has no body; give an object with messages")


def digest(*parts: bytes) -> int:
    """Returns 64 bits that stand for some bytes."""
    hashed = hashlib.blake2b(digest_size=8)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(hashed.digest(), "little")


def number_lines(file: IO[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Yields the number, length and content of each line; the content is empty if it is longer than `MOST_BYTES`."""
    number = 0
    while line := file.readline(MOST_BYTES):
        number, length, piece = number + 1, len(line), line
        while len(piece) == MOST_BYTES and not piece.endswith(b"\n"):
            piece = file.readline(MOST_BYTES)
            length += len(piece)
        yield number, length, line.strip() if length == len(line) else b""


def name_of(content: bytes) -> str | None:
    """Returns the `custom_id` of a line; None if it has none that can be used."""
    try:
        name = parse_line(content).get("custom_id")
    except InputError:
        return None
    return name if is_name(name) else None


def is_name(value: Any) -> bool:
    """Returns whether a value can be a `custom_id`: a text, and no half of a character in it."""
    try:
        return isinstance(value, str) and bool(value.encode())
    except UnicodeEncodeError:
        return False


def keys_of(number: int, content: bytes, name: str | None) -> tuple[int, int]:
    """Returns the keys of a line: what it shares with all lines of its `custom_id`, and its own."""
    own = digest(b"request", content)
    if name is None:
        own = numbered_key(own, number)
        return own, own
    return digest(b"name", name.encode()), own


def numbered_key(key: int, number: int) -> int:
    """Returns the key of a line that stands for its number too, because it is broken or not the first of its name."""
    return digest(key.to_bytes(8, "little"), number.to_bytes(8, "little"))


def request_line(number: int, content: bytes, duplicate_of: int | None = None) -> RequestLine:
    """Returns the line of a request that is read otherwise than by a `RequestFile`, with the same key."""
    content = content.strip()
    key = keys_of(number, content, name_of(content))[1]
    return RequestLine(number, content, key if duplicate_of is None else numbered_key(key, number), duplicate_of)


class RequestFile:
    """The index of a file of requests, with 25 bytes a line.

    Args:
      path: Local file, which does not change while it is answered.

    Attributes:
      keys: [lines] uint64, the key of each line.
      used: [lines] bool, whether a line is a request, rather than blank.

    Raises:
      InputError: The file cannot be read, or is no regular file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        names, keys, ends = array.array("Q"), array.array("Q"), array.array("Q", [0])
        used = bytearray()
        try:
            if not self.path.is_file():
                raise InputError(f"{self.path}: {'not a file' if self.path.exists() else 'no such file'}; give one")
            self._file = open(self.path, "rb")  # noqa: SIM115 (stays open until `close`)
            for number, length, content in number_lines(self._file):
                ends.append(ends[-1] + length)
                is_blank = not content and length <= MOST_BYTES
                used.append(not is_blank)
                name, key = (0, 0) if is_blank else keys_of(number, content, name_of(content))
                names.append(name)
                keys.append(key)
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror or error}; give a file of requests") from None
        self._ends, self._names = np.array(ends, np.uint64), np.array(names, np.uint64)
        self.keys, self.used = np.array(keys, np.uint64), np.frombuffer(bytes(used), bool)
        self._first = self._find_duplicates()

    def _find_duplicates(self) -> dict[int, int]:
        """Gives duplicates keys of their own, and returns the first line of their names by their index."""
        lines = np.flatnonzero(self.used)
        unique, first, counts = np.unique(self._names[lines], return_index=True, return_counts=True)
        firsts = dict(zip(unique[counts > 1].tolist(), lines[first[counts > 1]].tolist(), strict=True))
        found: dict[int, int] = {}
        for index in lines[np.isin(self._names[lines], unique[counts > 1])].tolist() if firsts else ():
            original = firsts[int(self._names[index])]
            if index != original:
                found[index] = original
                self.keys[index] = numbered_key(int(self.keys[index]), index + 1)
        return found

    def lines_of(self, shard: Shard) -> np.ndarray:
        """Returns the indices of the lines of a shard, which are decided by their names, in order."""
        return np.flatnonzero(self.used & (self._names % np.uint64(shard.count) == shard.number - 1))

    def read(self, index: int) -> RequestLine:
        """Reads a line again. It may be called from several threads.

        Raises:
          RunError: The file has changed.
        """
        start, end = int(self._ends[index]), int(self._ends[index + 1])
        number, key, first = int(index) + 1, int(self.keys[index]), self._first.get(int(index))
        is_readable = end - start <= MOST_BYTES
        content = os.pread(self._file.fileno(), end - start, start).strip() if is_readable else b""
        own = digest(b"request", content)
        if key not in (own, numbered_key(own, number)):
            raise RunError(f"{self.path}, line {number}: has changed meanwhile; run the same command again")
        return RequestLine(number, content, key, None if first is None else first + 1)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
