"""The interface of all sources of records, and a reader of byte ranges for their files."""

import abc
import dataclasses
import functools
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from data_pipelines.sample_errors import NOT_JSON, NOT_UTF8, BadSampleError, SampleError, from_exception
from vl3_jax.storage.file_digests import FileDigests

Result = TypeVar("Result")

_FINGERPRINT_BYTES = 64 * 2**10  # at each end of a file
_STORED_DIGESTS = ("md5Hash", "crc32c", "ETag", "etag")  # of gcsfs, s3fs and other file systems


@dataclasses.dataclass(frozen=True)
class Record:
    """A parsed annotation record.

    Attributes:
      fields: The record as parsed.
      where: Its location: file and line, or shard and sample.
    """

    fields: Mapping[str, Any]
    where: str


def map_record(record: Record | SampleError, function: Callable[[Record], Result]) -> Result | SampleError:
    """Returns the result of a function of a record, or the error of a bad sample."""
    if isinstance(record, SampleError):
        return record
    try:
        return function(record)
    except Exception as error:  # a damaged file may raise anything; it is an error of this sample only
        return from_exception(error, record.where)


class RecordSource(abc.ABC):
    """A sequence of records. Indexing returns a `SampleError` for a bad record instead of raising.

    File handles are opened lazily, in each process separately.

    Attributes:
      KIND: Names sources of this kind in the fingerprint of their file.
      path: Path or URL of the file, folder or generator that holds the records.
    """

    KIND: ClassVar[str]

    def __init__(self, path: str = ""):
        self.path = path
        self._lock = threading.Lock()

    @abc.abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record | SampleError:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path}: record {index} of {len(self)}")
        where = self.where(index)
        try:
            return Record(self.read(index), where)
        except Exception as error:  # whatever a damaged file raises is an error of this record only
            return from_exception(error, where)

    def where(self, index: int) -> str:
        """Returns the location of a record: file and line, or shard and sample."""
        return f"{self.path}, record {index + 1}"

    @abc.abstractmethod
    def read(self, index: int) -> Mapping[str, Any]:
        """Returns the fields of a record.

        Raises:
          BadSampleError: The record cannot be read.
        """

    def fingerprint(self, digests: FileDigests) -> list[Any]:
        """Returns JSON values that identify the content of this source; part of the key of its index.

        These are `KIND`, the number of records, and the size and digest of the file at `path`; not the path, so that
        data may be moved.
        """
        return [self.KIND, len(self), *ByteFile(self.path).fingerprint(digests)]

    def outline(self) -> "RecordSource":
        """Returns a source whose records have the same lengths but may be cheaper to read."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name != "_lock" and not name.startswith("_open")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def parse_json(content: bytes, name: str) -> Any:
    """Parses JSON, naming its origin in errors.

    Raises:
      BadSampleError: The content is not UTF-8, not JSON, nested too deeply, or has a key twice or too long a number.
    """
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise BadSampleError(NOT_UTF8, f"byte {error.start} of {name} is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadSampleError(NOT_JSON, f"{error.msg} at character {error.pos + 1} of {name}") from None
    except RecursionError:
        raise BadSampleError(NOT_JSON, f"{name} is nested too deeply") from None
    except ValueError:
        raise BadSampleError(NOT_JSON, f"{name} holds a number of thousands of digits; write it shorter") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object; JSON allows a key twice, but one of its values would be lost."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise BadSampleError(NOT_JSON, f'"{twice}" occurs twice in an object; keep one of them')
    return fields


class ByteFile:
    """Reads byte ranges of a local file or URL; thread-safe, opened lazily, closed with the object."""

    def __init__(self, path: str):
        self.path = path

    def read(self, start: int, stop: int) -> bytes:
        """Returns the bytes [start, stop); fewer at the end of the file, however far beyond it `stop` may be."""
        filesystem, file = self._opened
        if filesystem is None:
            return os.pread(file.fileno(), max(min(stop, self.size) - start, 0), start)
        return filesystem.cat_file(file, start=start, end=stop)

    @property
    def size(self) -> int:
        filesystem, file = self._opened
        return os.fstat(file.fileno()).st_size if filesystem is None else filesystem.size(file)

    def fingerprint(self, digests: FileDigests) -> list[Any]:
        """Returns size and digest of a local file; of a URL, the digest that its store keeps, or one of both ends."""
        filesystem, key = self._opened
        size = self.size
        if filesystem is None:
            return [size, digests.digest(self.path)]
        information = filesystem.info(key)
        stored = next((str(information[name]) for name in _STORED_DIGESTS if information.get(name)), None)
        if stored:
            return [size, stored]
        ends = self.read(0, min(size, _FINGERPRINT_BYTES)) + self.read(max(size - _FINGERPRINT_BYTES, 0), size)
        return [size, hashlib.blake2b(ends, digest_size=8).hexdigest()]

    @functools.cached_property
    def _opened(self) -> tuple[Any, Any]:
        """The file system of a URL and the key in it; None and the open file for a local path."""
        if "://" not in self.path:
            return None, open(self.path, "rb", buffering=0)  # closed with this object
        import fsspec

        return fsspec.core.url_to_fs(self.path)

    def __reduce__(self):
        return ByteFile, (self.path,)
