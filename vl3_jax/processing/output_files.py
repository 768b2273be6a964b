"""Folders and files that pictures and masks are written to: checked before the work, and one line where they fail."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from vl3_jax.errors import InputError


def empty_folder(folder: str | os.PathLike) -> pathlib.Path:
    """Creates a folder unless it exists, and checks that files can be written to it.

    Raises:
      InputError: It is not empty, it is a file or a URL, or it cannot be written.
    """
    path = _local(folder, "folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise InputError(f"{path}: the folder holds other files; give a new or an empty one for the pictures")
    except FileExistsError:
        raise InputError(f"{path}: is a file; give a new or an empty folder for the pictures") from None
    except (OSError, ValueError) as error:
        raise _not_writable(path, error, "folder") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{path}: not allowed to write there; give another folder for the pictures")
    return path


def new_file(file: str | os.PathLike) -> pathlib.Path:
    """Checks that a file does not exist and can be written, and creates nothing.

    Raises:
      InputError: It exists, its folder does not or may not be written, or it is a URL.
    """
    path = _local(file, "file")
    try:
        path.lstat()
        raise InputError(f"{path}: exists; remove it, or give another name")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise _not_writable(path, error, "file") from None
    if not path.parent.is_dir():
        raise InputError(f"{path}: its folder does not exist; create {path.parent}, or give another name")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"{path}: not allowed to write there; give a file in another folder")
    return path


@contextlib.contextmanager
def refuse_unwritable(path: str | os.PathLike, kind: str = "folder") -> Iterator[None]:
    """Turns an error of writing into an `InputError` that names `path` and asks for another folder or file."""
    try:
        yield
    except OSError as error:
        raise _not_writable(path, error, kind) from None


def _local(name: str | os.PathLike, kind: str) -> pathlib.Path:
    if "://" in os.fspath(name):
        raise InputError(f"{name}: is a URL; give a {kind} of this machine for the pictures")
    return pathlib.Path(os.path.expanduser(name))


def _not_writable(path: str | os.PathLike, error: Exception, kind: str) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"{path}: cannot be written ({reason}); give another {kind} for the pictures")
