"""Digests of files: what a file holds, wherever it lies and whenever it was written."""

import contextlib
import hashlib
import json
import os
import pathlib
from typing import Any

from etils import epath

from vl3_jax.storage.durable import atomic_write

_BYTES = 8  # of a digest


class FileDigests:
    """Computes digests of local files, and stores them so that a file is read again only if it may have changed.

    A file whose path, size and modification time are those of a stored digest is not read.

    Args:
      file: JSON file of the stored digests, which need not exist; None stores them with this object only.
    """

    def __init__(self, file: str | os.PathLike | None = None):
        self._file = file and epath.Path(pathlib.Path(file).absolute())
        self._stored: dict[str, list[Any]] = {}
        if self._file:
            with contextlib.suppress(OSError, ValueError, TypeError):  # there is none, or it is damaged
                self._stored = dict(json.loads(self._file.read_text()))

    def digest(self, path: str) -> str:
        """Returns the digest of a file's content as hexadecimal digits."""
        status = os.stat(path)
        state = [status.st_size, status.st_mtime_ns]
        *known, digest = self._stored.get(os.path.abspath(path)) or [None]
        if known != state or not isinstance(digest, str):
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_BYTES)).hexdigest()
            self._stored[os.path.abspath(path)] = [*state, digest]
            self._save()
        return digest

    def _save(self) -> None:
        if self._file:
            with contextlib.suppress(OSError):  # where nothing can be written, files are read again each time
                self._file.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(self._file, json.dumps(self._stored).encode())
