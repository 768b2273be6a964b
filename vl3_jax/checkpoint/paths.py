"""Folders on a disk and under gs:// alike: one type of path (`epath.Path`), one listing, one line for a refusal."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from vl3_jax.errors import InputError

_GCS = "gs://"
_INSTALL = "gs:// needs `pip install vl3_jax[gcs]`"
# How tensorstore and gcsfs begin their messages; other clients carry the number in `code`.
_STATUS = {"PERMISSION_DENIED": 403, "Forbidden": 403, "UNAUTHENTICATED": 401, "NOT_FOUND": 404}
# Classes of exceptions, of several clients, that carry none.
_CLASSES = {
    "FileNotFoundError": 404,
    "DefaultCredentialsError": 401,
    "RefreshError": 401,
    "ClientConnectionError": 503,
    "ConnectionError": 503,
    "TransportError": 503,
}
_TROUBLES = {
    401: "no valid credentials; log in with `gcloud auth application-default login`",
    403: "permission denied; reading needs the role Storage Object Viewer, writing Storage Object User and Storage "
    "Legacy Bucket Reader",
    404: "no such bucket or folder; check the address",
    503: "cannot be reached; check the network",
}


def is_url(path: str | os.PathLike) -> bool:
    """Whether `path` is a URL such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def open_url(url: str | os.PathLike):
    """(fsspec filesystem, key) of a URL.

    Raises:
      InputError: nothing here reads such a URL; one line.
    """
    try:
        import fsspec

        return fsspec.core.url_to_fs(os.fspath(url))
    except (ImportError, ValueError) as error:
        raise InputError(f"{url}: cannot be read here ({error}); {_INSTALL}") from None


def resolve(location: str | os.PathLike) -> epath.Path:
    """The absolute path of a local folder, or of one under gs://.

    Raises:
      InputError: another kind of URL, or gs:// without its clients; one line.
    """
    text = os.fspath(location)
    if not is_url(text):
        return epath.Path(pathlib.Path(text).absolute())
    if not text.startswith(_GCS):
        raise InputError(f"{text}: a place for checkpoints is a local folder or gs://bucket/folder")
    open_url(text)
    return epath.Path(text)


def list_dir(folder: str | os.PathLike) -> dict[str, int]:
    """Names in a folder, as it is now, and their sizes in bytes; empty where there is no folder.

    Raises:
      InputError: it cannot be listed; one line.
    """
    if is_url(folder):
        with translate_io_errors(folder):
            filesystem, key = open_url(folder)
            filesystem.invalidate_cache(key)  # others write there too
            try:
                found = filesystem.ls(key, detail=True)
            except FileNotFoundError:
                return {}
        sizes = {entry["name"].rstrip("/"): entry.get("size") or 0 for entry in found}
        return {name.rsplit("/", 1)[-1]: size for name, size in sizes.items() if name != key.rstrip("/")}
    try:
        with os.scandir(folder) as found:
            return {entry.name: _size(entry) for entry in found}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except PermissionError:
        raise InputError(f"{folder}: not allowed to look into it; choose another folder") from None


def exists(file: epath.Path) -> bool:
    """Whether there is such a file now."""
    return file.name in list_dir(file.parent) if is_url(file) else file.exists()


def atomic_write(file: epath.Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    if is_url(file):  # an object is not there before its last byte
        file.write_bytes(content)
        return
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(content)
    partial.replace(file)


def _size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a link to nowhere
        return 0


def kvstore(folder: epath.Path) -> dict[str, Any]:
    """The folder as a key-value store of tensorstore."""
    text = os.fspath(folder)
    if not text.startswith(_GCS):
        return {"driver": "file", "path": f"{text}/"}
    bucket, _, path = text.removeprefix(_GCS).partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{path}/" if path else ""}


def check_bucket(location: epath.Path) -> None:
    """InputError unless the bucket of a gs:// place is there and open to us: clients would make a missing one."""
    if not is_url(location):
        return
    with translate_io_errors(location):
        try:
            from google.cloud import storage
        except ImportError:
            raise InputError(f"{location}: {_INSTALL}") from None
        next(iter(storage.Client().list_blobs(kvstore(location)["bucket"], max_results=1)), None)


@contextlib.contextmanager
def translate_io_errors(location: str | os.PathLike) -> Iterator[None]:
    """Turns what the clients of a URL raise when it is not there or not allowed into one InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if is_url(location) and (trouble := _TROUBLES.get(_status(error))):
            raise InputError(f"{location}: {trouble}") from None
        raise


def _status(error: Exception) -> int | None:
    """The HTTP status behind an exception of gcsfs, google-cloud-storage or tensorstore, or the one nearest to it."""
    if isinstance(code := getattr(error, "code", None), int):
        return int(code)
    found = [_CLASSES[parent.__name__] for parent in type(error).__mro__ if parent.__name__ in _CLASSES]
    found += [status for start, status in _STATUS.items() if str(error).startswith(start)]
    return found[0] if found else None
