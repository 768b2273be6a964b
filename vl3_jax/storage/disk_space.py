"""Space on disks: checked before something is written, and one line where a disk is full or may not be written."""

import contextlib
import errno
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

from vl3_jax.errors import InputError
from vl3_jax.storage.paths import is_url, translate_io_errors
from vl3_jax.storage.progress import human_bytes

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# The same of TensorStore and other libraries, and of NumPy, which keeps neither the number nor the text.
_FULL_TEXT = re.compile(r"No space left|quota exceeded|File too large|\d+ requested and \d+ written", re.IGNORECASE)
_AGAIN = "free some space and run the same command again"


def check_space(location: str | os.PathLike, needed: int, what: str = "", advice: str = "") -> None:
    """Raises InputError unless the disk of a location has `needed` bytes free; under a URL there always are.

    Args:
      location: Folder or file to write, which need not exist yet.
      needed: Bytes that will be written.
      what: What they are for.
      advice: What else to do than to free some space.
    """
    free = None if is_url(location) else free_space(location)
    if free is not None and needed > free:
        raise InputError(
            f"{location}: no space left: {human_bytes(needed)} are needed{what and f' for {what}'} and "
            f"{human_bytes(free)} are free; free some space{advice and f', {advice},'} and run the same command again"
        )


def free_space(location: str | os.PathLike) -> int:
    """Returns the free bytes of the disk on which a local folder or file is, or would be."""
    path = pathlib.Path(os.path.abspath(location))
    return shutil.disk_usage(next(filter(pathlib.Path.exists, (path, *path.parents)))).free


@contextlib.contextmanager
def translate_full_disk(target: str | os.PathLike) -> Iterator[None]:
    """Translates errors of any library about a full disk into an InputError that names `target`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise InputError(full_disk_message(target)) from None


def full_disk_message(target: str | os.PathLike) -> str:
    """Returns the line about a disk that became full while `target` was written."""
    free = "" if is_url(target) else f" ({human_bytes(free_space(target))} are free there now)"
    return f"{target}: no space left on the disk, or a limit of a file's size or a quota is reached{free}; {_AGAIN}"


def is_full_disk(error: BaseException) -> bool:
    """Returns whether an error, or one that it arose from, is that of a full disk."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if getattr(current, "errno", None) in _FULL or _FULL_TEXT.search(str(current)):
            return True
        pending += [current.__cause__, current.__context__, *getattr(current, "exceptions", ())]
    return False


@contextlib.contextmanager
def translate_write_errors(target: str | os.PathLike) -> Iterator[None]:
    """Translates errors of any library about a full, read-only or forbidden target into an InputError."""
    try:
        with translate_full_disk(target), translate_io_errors(target):
            yield
    except InputError:
        raise
    except Exception as error:
        where = getattr(error, "filename", None) or target
        text, number = str(error), getattr(error, "errno", None)
        if isinstance(error, PermissionError) or "Permission denied" in text:
            message = "not allowed to write there; choose another folder"
        elif number == errno.EROFS:
            message = "the disk is read-only; choose another folder"
        elif isinstance(error, OSError) and error.strerror:
            raise InputError(f"{where}: {error.strerror}; check the path or choose another one") from None
        else:
            raise
        raise InputError(f"{target}: {message}") from None
