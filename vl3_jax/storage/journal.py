"""Files of JSON lines that one run appends to and a later run resumes from."""

import contextlib
import fcntl
import json
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from vl3_jax.errors import InputError
from vl3_jax.storage.disk_space import translate_full_disk

_BLOCK = 2**16  # bytes


def read_lines(
    path: str | os.PathLike, parse: Callable[[Any], Any], refusal: str, whole_lines: bool = False
) -> list[Any]:
    """Reads a file of JSON lines.

    Args:
      path: Local file.
      parse: Converts the value of a line to an entry; a ValueError, KeyError or TypeError refuses the line.
      refusal: What is wrong with a refused line and what to do, for the error message.
      whole_lines: Whether to leave out a last line without an end, which somebody is still writing.

    Raises:
      InputError: A line is refused; the message names it.
      OSError: The file cannot be read.
    """
    content = pathlib.Path(path).read_bytes()
    return _parse_lines(path, content[: content.rfind(b"\n") + 1] if whole_lines else content, parse, refusal)


def whole_lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
    """Yields each line of a file with its number from 1, without holding the file.

    A last line without an end is left out: somebody is still writing it, or was killed meanwhile.

    Raises:
      OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield number, line


class LineLog:
    """An open file of JSON lines, to which several threads and processes may append.

    Opening it removes the last line if the process that wrote it was killed before the end of the line.

    Attributes:
      empty: Whether the file was empty.
    """

    def __init__(self, path: str | os.PathLike, flush_seconds: float = 0.0):
        """Opens the file, or creates it.

        Args:
          path: Local file.
          flush_seconds: Lines of so many seconds may be lost in a power cut; none when the process ends.

        Raises:
          OSError: The file cannot be read or written.
        """
        self._file = open(path, "a+b")  # noqa: SIM115 (stays open until `close`)
        self._thread_lock = threading.Lock()
        self._flush_seconds, self._flushed = flush_seconds, time.monotonic()
        with self._locked():
            size = self._file.seek(0, os.SEEK_END)
            self.empty = size == 0
            self._file.truncate(_complete_length(self._file, size))

    def append(self, entry: Any) -> None:
        """Appends a JSON value as one line."""
        with self._locked():
            self._write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        """Closes the file."""
        with translate_full_disk(self._file.name):
            if self._flush_seconds:
                os.fsync(self._file.fileno())
            self._file.close()

    def _write(self, content: bytes) -> None:
        with translate_full_disk(self._file.name):
            self._file.write(content)
            self._file.flush()
            if time.monotonic() - self._flushed >= self._flush_seconds:
                os.fsync(self._file.fileno())
                self._flushed = time.monotonic()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other threads away from the file, and other processes if the file system has locks."""
        with self._thread_lock, contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_EX)
                stack.callback(fcntl.flock, self._file, fcntl.LOCK_UN)
            yield


class Journal(LineLog):
    """A log that a later run resumes from; a line is on the disk when `append` returns.

    Attributes:
      entries: What earlier runs have appended.
      resumed: Whether the file belongs to `fingerprint`; otherwise `entries` is empty, and `restart` comes next.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        parse: Callable[[Any], Any],
        refusal: str,
        fingerprint: str | None = None,
    ):
        """Opens the file, or creates it.

        Args:
          path: Local file.
          parse: Converts the value of a line to an entry; a ValueError, KeyError or TypeError refuses the line.
          refusal: What is wrong with a refused line and what to do, for the error message.
          fingerprint: Identifies what the file belongs to, and is its first line. None for a file without such a line.

        Raises:
          InputError: A line is refused.
          OSError: The file cannot be read or written.
        """
        super().__init__(path)
        with self._locked():
            self._file.seek(0)
            content = self._file.read()
        self._header = b"" if fingerprint is None else fingerprint.encode() + b"\n"
        self.resumed = content.startswith(self._header)
        lines = content.removeprefix(self._header) if self.resumed else b""
        self.entries = _parse_lines(path, lines, parse, refusal)

    def restart(self) -> None:
        """Empties the file and begins it with the fingerprint."""
        with self._locked():
            self._file.truncate(0)
            self._write(self._header)


def _complete_length(file: IO[bytes], size: int) -> int:
    """Returns the length of a file up to the end of its last complete line."""
    while size:
        start = max(size - _BLOCK, 0)
        file.seek(start)
        end = file.read(size - start).rfind(b"\n")
        if end >= 0:
            return start + end + 1
        size = start
    return 0


def _parse_lines(path: str | os.PathLike, content: bytes, parse: Callable[[Any], Any], refusal: str) -> list[Any]:
    entries = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            entries.append(parse(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}, line {number}: {refusal}") from None
    return entries
