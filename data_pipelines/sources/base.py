"""What all sources have in common."""

import abc
import dataclasses
import hashlib
import os
import threading
from collections.abc import Mapping
from typing import Any

from data_pipelines.sample_errors import SampleError

_STAMP_BYTES = 64 * 2**10


@dataclasses.dataclass(frozen=True)
class Record:
    """An annotation record as parsed, and where it stands: file and line, or shard and sample."""

    fields: Mapping[str, Any]
    where: str


class RecordSource(abc.ABC):
    """A sequence of records. Reading a bad one gives its problem, so that the rest goes on.

    Handles of files are opened when first needed, for each process anew.
    """

    def __init__(self):
        self._lock = threading.Lock()

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record | SampleError: ...

    @abc.abstractmethod
    def fingerprint(self) -> list[Any]:
        """What tells this source's content from another's; for the index's fingerprint."""

    def outline(self) -> "RecordSource":
        """The same records as far as their lengths go, where that is cheaper than reading them."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name != "_lock" and not name.startswith("_open")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


class ByteFile:
    """Reads stretches of a local file or URL; thread-safe, opened lazily, closed with the object."""

    def __init__(self, path: str):
        self.path = path
        self._descriptor: int | None = None
        self._remote = None
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop); fewer at the end of the file."""
        with self._lock:
            self._connect()
        if self._remote:
            filesystem, key = self._remote
            return filesystem.cat_file(key, start=start, end=stop)
        return os.pread(self._descriptor, stop - start, start)

    @property
    def size(self) -> int:
        with self._lock:
            self._connect()
        return self._remote[0].size(self._remote[1]) if self._remote else os.fstat(self._descriptor).st_size

    def fingerprint(self) -> list[Any]:
        """Name, size and a hash of both ends: equal for a copy elsewhere, different after an edit of either end."""
        size = self.size
        ends = self.read(0, min(size, _STAMP_BYTES)) + self.read(max(size - _STAMP_BYTES, 0), size)
        return [os.path.basename(self.path), size, hashlib.blake2b(ends, digest_size=8).hexdigest()]

    def _connect(self) -> None:
        if self._descriptor is None and self._remote is None:
            if "://" in self.path:
                import fsspec

                self._remote = fsspec.core.url_to_fs(self.path)
            else:
                self._descriptor = os.open(self.path, os.O_RDONLY)

    def __getstate__(self) -> str:
        return self.path

    def __setstate__(self, path: str) -> None:
        self.__init__(path)

    def __del__(self):
        if getattr(self, "_descriptor", None) is not None:
            os.close(self._descriptor)
