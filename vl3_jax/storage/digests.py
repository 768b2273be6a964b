"""Digests of files: what a file holds, wherever it lies and whenever it was written."""

import contextlib
import hashlib
import json
import os
import pathlib

from etils import epath

from vl3_jax.storage.paths import atomic_write

_BYTES = 8  # of a digest


class FileDigests:
    """Computes digests of local files, and stores them so that a file is read again only if it may have changed.

    A file whose path, size and modification time are those of a stored digest is not read.

    Args:
      file: JSON file of the stored digests; it need not exist, and is left out where it cannot be written.
    """

    def __init__(self, file: str | os.PathLike):
        self._file = epath.Path(pathlib.Path(file).absolute())
        try:
            self._stored = dict(json.loads(self._file.read_text()))
        except (OSError, ValueError, TypeError):
            self._stored = {}

    def digest(self, path: str) -> str:
        """Returns the digest of a file's content as hexadecimal digits."""
        status = os.stat(path)
        state = [status.st_size, status.st_mtime_ns]
        *known, digest = self._stored.get(os.path.abspath(path)) or [None]
        if known != state or not isinstance(digest, str):
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_BYTES)).hexdigest()
            self._stored[os.path.abspath(path)] = [*state, digest]
            with contextlib.suppress(OSError):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(self._file, json.dumps(self._stored).encode())
        return digest
