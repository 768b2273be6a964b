"""Paths, directory listings and I/O errors for local folders and folders under gs:// alike."""

import contextlib
import errno
import os
import pathlib
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from vl3_jax.errors import InputError

_GCS = "gs://"
_NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)  # or a ValueError: a name with a null byte
_INSTALL = "gs:// needs `pip install vl3_jax[gcs]`"
# HTTP status by the exception classes of several clients, and the first word of a TensorStore or gcsfs message; other
# clients store the number in `code`.
_STATUS_SIGNS = {
    401: ("DefaultCredentialsError", "RefreshError", "UNAUTHENTICATED"),
    403: ("PERMISSION_DENIED", "Forbidden"),
    404: ("FileNotFoundError", "NOT_FOUND"),
    503: ("ClientConnectionError", "ConnectionError", "TransportError"),
}
_removals: list[weakref.finalize] = []
_STATUS_MESSAGES = {
    401: "no valid credentials; log in with `gcloud auth application-default login`",
    403: "permission denied; reading needs the role Storage Object Viewer, writing Storage Object User and Storage "
    "Legacy Bucket Reader",
    404: "no such bucket or folder; check the address",
    503: "cannot be reached; check the network",
}


def is_url(path: str | os.PathLike) -> bool:
    """Returns whether `path` is a URL such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def open_url(url: str | os.PathLike):
    """Returns the fsspec file system of a URL and the key of the URL in it.

    Raises:
      InputError: No installed file system reads such a URL.
    """
    try:
        import fsspec

        return fsspec.core.url_to_fs(os.fspath(url))
    except (ImportError, ValueError) as error:
        raise InputError(f"{url}: cannot be read ({error}); {_INSTALL}") from None


def resolve(location: str | os.PathLike) -> epath.Path:
    """Returns the absolute path of a local folder or of one under gs://.

    Raises:
      InputError: `location` is another kind of URL, or the clients for gs:// are not installed.
    """
    text = os.fspath(location)
    if not is_url(text):
        return epath.Path(pathlib.Path(text).absolute())
    if not text.startswith(_GCS):
        raise InputError(f"{text}: a checkpoint location is a local folder or gs://bucket/folder")
    open_url(text)
    return epath.Path(text)


def list_dir(folder: str | os.PathLike) -> dict[str, int]:
    """Lists a folder without caching.

    Args:
      folder: Local folder or URL.

    Returns:
      Sizes in bytes by name; empty if the folder does not exist.

    Raises:
      InputError: The folder cannot be listed.
    """
    if is_url(folder):
        with translate_io_errors(folder):
            filesystem, key = open_url(folder)
            filesystem.invalidate_cache(key)  # other processes write to the folder too
            try:
                entries = filesystem.ls(key, detail=True)
            except FileNotFoundError:
                return {}
        sizes = {entry["name"].rstrip("/"): entry.get("size") or 0 for entry in entries}
        return {name.rsplit("/", 1)[-1]: size for name, size in sizes.items() if name != key.rstrip("/")}
    try:
        with os.scandir(folder) as entries:
            return {entry.name: _size(entry) for entry in entries}
    except PermissionError:
        raise InputError(f"{folder}: no permission to list it; choose another folder") from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_FOLDER:
            raise
        return {}


def exists(file: epath.Path) -> bool:
    """Returns whether the file exists, without caching."""
    return file.name in list_dir(file.parent) if is_url(file) else file.exists()


def file_fingerprints(paths: Iterable[str]) -> list[list]:
    """Returns [path, size, modification time] of each file, which a resumed job compares with its own."""
    fingerprints = []
    for path in paths:
        if is_url(path):
            filesystem, key = open_url(path)
            info = filesystem.info(key)
            modified = str(info.get("mtime") or info.get("updated") or info.get("created"))
            fingerprints.append([path, info["size"], modified])
        else:
            with contextlib.suppress(OSError):
                status = os.stat(path)
                fingerprints.append([os.path.realpath(path), status.st_size, status.st_mtime_ns])
    return fingerprints


def temporary_folder(owner: object, prefix: str) -> pathlib.Path:
    """Creates a temporary folder that is removed together with the object `owner`."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix=prefix))
    _removals.append(weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True))
    return folder


def remove_temporary_folders() -> None:
    """Removes all temporary folders, where the process ends without a last word to their owners."""
    for remove in _removals:
        remove()


def _size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a broken link
        return 0


def kvstore(folder: epath.Path) -> dict[str, Any]:
    """Returns the TensorStore key-value store spec of a folder."""
    text = os.fspath(folder)
    if not text.startswith(_GCS):
        return {"driver": "file", "path": f"{text}/"}
    bucket, _, path = text.removeprefix(_GCS).partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{path}/" if path else ""}


def check_bucket(location: epath.Path) -> None:
    """Raises InputError unless the bucket of a gs:// location exists and is readable; clients would create it.

    Local locations pass.
    """
    if not is_url(location):
        return
    with translate_io_errors(location):
        next(iter(_bucket(location).list_blobs(max_results=1)), None)


def bucket_object(folder: str | os.PathLike, name: str) -> Any:
    """Returns an object of a folder under gs:// as the google-cloud-storage client has it: with its generation."""
    return _bucket(folder).blob(f"{kvstore(resolve(folder))['path']}{name}")


def _bucket(location: str | os.PathLike) -> Any:
    try:
        from google.cloud import storage
    except ImportError:
        raise InputError(f"{location}: {_INSTALL}") from None
    return storage.Client().bucket(kvstore(resolve(location))["bucket"])


@contextlib.contextmanager
def translate_io_errors(location: str | os.PathLike) -> Iterator[None]:
    """Translates errors of the clients of a URL (missing, forbidden, unreachable) into an InputError."""
    try:
        yield
    except Exception as error:
        if is_url(location) and (message := _STATUS_MESSAGES.get(_status(error))):
            raise InputError(f"{location}: {message}") from None
        raise


def is_unreachable(error: Exception) -> bool:
    """Returns whether an error of a client of a URL says nothing about what is stored there."""
    return _status(error) in (401, 403, 503)


def _status(error: Exception) -> int | None:
    """Returns the HTTP status of a gcsfs, google-cloud-storage or TensorStore exception, or the closest one."""
    if isinstance(code := getattr(error, "code", None), int):
        return int(code)
    classes = {parent.__name__ for parent in type(error).__mro__}
    found = (code for code, signs in _STATUS_SIGNS.items() if classes & {*signs} or str(error).startswith(signs))
    return next(found, None)
