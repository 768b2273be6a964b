"""A file of JSON lines that one run appends to and a later run resumes from."""

import contextlib
import fcntl
import json
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.storage.disk_space import translate_full_disk


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


class Journal:
    """An open file of JSON lines, to which several threads and processes may append.

    Opening it removes the last line if the process that wrote it was killed before the end of the line.

    Attributes:
      entries: What earlier runs have appended.
      resumed: Whether the file belongs to `fingerprint`; otherwise `entries` is empty, and `restart` comes next.
      empty: Whether the file was empty.
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
        self._file = open(path, "a+b")  # noqa: SIM115 (stays open until `close`)
        self._thread_lock = threading.Lock()
        with self._locked():
            self._file.seek(0)
            content = self._file.read()
            complete = content[: content.rfind(b"\n") + 1]
            self._file.truncate(len(complete))
        self._header = b"" if fingerprint is None else fingerprint.encode() + b"\n"
        self.empty, self.resumed = not content, complete.startswith(self._header)
        lines = complete.removeprefix(self._header) if self.resumed else b""
        self.entries = _parse_lines(path, lines, parse, refusal)

    def restart(self) -> None:
        """Empties the file and begins it with the fingerprint."""
        with self._locked():
            self._file.truncate(0)
            self._write(self._header)

    def append(self, entry: Any) -> None:
        """Appends a JSON value as one line, which is on the disk when this returns."""
        with self._locked():
            self._write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")

    def close(self) -> None:
        """Closes the file."""
        with translate_full_disk(self._file.name):
            self._file.close()

    def _write(self, content: bytes) -> None:
        with translate_full_disk(self._file.name):
            self._file.write(content)
            self._file.flush()
            os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other threads away from the file, and other processes if the file system has locks."""
        with self._thread_lock, contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_EX)
                stack.callback(fcntl.flock, self._file, fcntl.LOCK_UN)
            yield


def _parse_lines(path: str | os.PathLike, content: bytes, parse: Callable[[Any], Any], refusal: str) -> list[Any]:
    entries = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            entries.append(parse(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}, line {number}: {refusal}") from None
    return entries
