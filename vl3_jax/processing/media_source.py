"""The file behind an image or video: a path or bytes."""

import io
import os
from typing import Any

from vl3_jax.errors import InputError


def path_or_bytes(source: Any, kind: str, files: str, forms: str) -> tuple[str | bytes, str]:
    """Returns the path or the content of a source, and its name for messages.

    Args:
      source: A path, bytes or a binary file object, which is read.
      kind: "image" or "video", for messages.
      files: What a path leads to, for messages.
      forms: All forms that a source of this kind may have, for messages.

    Raises:
      InputError: The file is missing or empty, or the source is of another type.
    """
    if hasattr(source, "read"):
        source = source.read()
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source), f"{kind} bytes"
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"the {kind} cannot be of type {type(source).__name__}; give {forms}")
    path = os.fspath(source)
    if not os.path.exists(path):
        raise InputError(f"{path}: no such {files}; check the path")
    if not os.path.isdir(path) and not os.path.getsize(path):
        raise InputError(f"{path}: the file is empty (0 bytes); replace it")
    return path, path


def as_file(data: str | bytes) -> str | io.BytesIO:
    """Returns a path as it is, and bytes as a file."""
    return io.BytesIO(data) if isinstance(data, bytes) else data


def first_bytes(data: str | bytes, count: int) -> bytes:
    """Returns the first bytes of the file at a path, or of bytes."""
    if isinstance(data, bytes):
        return data[:count]
    with open(data, "rb") as file:
        return file.read(count)
