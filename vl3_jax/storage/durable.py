"""Files that survive a power cut: their content is on the disk before anybody sees them under their names."""

import errno
import os
import pathlib

from etils import epath

from vl3_jax.storage.paths import is_url

_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP)  # of a file system that does not flush folders


def atomic_write(file: epath.Path | pathlib.Path, content: bytes) -> None:
    """Writes a file so that other processes, and any start after a power cut, see the old content or the new.

    Args:
      file: Local file or object under gs://.
      content: All of its content.
    """
    if is_url(file):  # objects are created atomically
        file.write_bytes(content)
        return
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(content)
    rename(partial, file)


def rename(source: os.PathLike, target: os.PathLike) -> None:
    """Renames a local file, or a folder with all that it holds, once its content is flushed.

    Args:
      source: File or folder.
      target: Its new name on the same disk; a file of this name is replaced.
    """
    flush_tree(source)
    os.replace(source, target)
    _flush_folder(pathlib.Path(target).parent)


def flush_tree(path: os.PathLike) -> None:
    """Writes a local file, or a folder with all that it holds, from the memory of the system to the disk."""
    if not os.path.isdir(path):
        _flush(path)
        return
    for folder, _, names in os.walk(path):
        for name in names:
            if not os.path.islink(file := os.path.join(folder, name)):
                _flush(file)
        _flush_folder(folder)


def _flush_folder(folder: str | os.PathLike) -> None:
    try:
        _flush(folder)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise


def _flush(path: str | os.PathLike) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
