"""What an image or video may be given as: a path, a reference, bytes, an open file.

    path_or_bytes("a.png", "image", ...)                       the path, checked
    path_or_bytes("file:///home/me/a%20b.png", "image", ...)   the path that the reference names
    path_or_bytes("data:image/png;base64,iVBO...", ...)        the bytes
    path_or_bytes(MediaBytes(content, "https://..."), ...)     the bytes, with their name for messages
    path_or_bytes("/dev/stdin", ...)                           the bytes, where it is a pipe
    reopenable("/dev/stdin", "image")                          `MediaBytes` of it, to be opened more than once

References on other machines are refused here, because nothing is fetched that was not asked for. Whoever allows them
passes sources through `remote_media.fetched` first, which turns http(s):// into `MediaBytes`.
"""

import base64
import binascii
import contextlib
import dataclasses
import io
import os
import re
import stat
import urllib.parse
from typing import Any

from vl3_jax.errors import InputError, printable

MAX_PIPE_BYTES = 2**31  # the content of a pipe is held in memory
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_PIECE = 2**20


@dataclasses.dataclass(frozen=True)
class MediaBytes:
    """The content of an image or video that is no local file.

    Attributes:
      data: The content.
      name: Its name for messages, such as its address.
    """

    data: bytes = dataclasses.field(repr=False)
    name: str


def scheme_of(source: Any) -> str | None:
    """Returns the scheme of a reference in lower case ("file", "data", "https"); None of a path or another source.

    A colon alone makes no reference: `10:22:33.mp4` is a path.
    """
    if not isinstance(source, str):
        return None
    if source[:5].lower() == "data:" and "," in source:
        return "data"
    match = _SCHEME.match(source)
    return match[1].lower() if match else None


def path_or_bytes(source: Any, kind: str, files: str, forms: str) -> tuple[str | bytes, str]:
    """Returns the path or the content of a source, and its name for messages.

    Args:
      source: A path, a `file://` or `data:` reference, bytes, `MediaBytes`, or a binary file object, which is read.
      kind: "image" or "video", for messages.
      files: What a path leads to, for messages.
      forms: All forms that a source of this kind may have, for messages.

    Returns:
      The path of a file or folder that may be read, which no library takes for anything but a path, or bytes.

    Raises:
      InputError: The file is missing, empty or may not be read, or the source is of another type.
    """
    if isinstance(source, MediaBytes):
        return source.data, printable(source.name)
    name = f"{kind} bytes"
    if hasattr(source, "read"):
        name, source = printable(getattr(source, "name", name)), source.read()
        if isinstance(source, str):
            raise InputError(f"{name}: the file is open as text; open it with mode 'rb'")
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source), name
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"the {kind} cannot be of type {type(source).__name__}; give {forms}")
    path = os.fsdecode(source)
    if not path:
        raise InputError(f"the {kind} has an empty name; give {forms}")
    scheme = scheme_of(source)
    if scheme == "data":
        return data_content(path), printable(path, 60)
    if scheme == "file":
        path = file_path(path)
    elif scheme in ("http", "https"):
        raise InputError(
            f"{printable(path)}: nothing is fetched from other machines unless you ask for it; allow it with "
            "--allow-remote (in Python allow_remote=True), or give a file"
        )
    elif scheme is not None:
        raise InputError(f"{printable(path)}: {scheme}:// is not read; give a path, file://, data: or https://")
    return _readable(path, files), printable(path)


def reopenable(source: Any, kind: str) -> Any:
    """Returns a source that can be opened any number of times: of a pipe or an open file its content, else itself.

    Args:
      source: Any source of an image or video; in a list or tuple, each of its sources.
      kind: "image" or "video", for messages.

    Raises:
      InputError: As `path_or_bytes`.
    """
    if isinstance(source, list | tuple):
        return [reopenable(item, kind) for item in source]
    if not hasattr(source, "read") and not _is_pipe(source):
        return source
    content, name = path_or_bytes(source, kind, f"{kind} file", "a path or bytes")
    return MediaBytes(content, name) if isinstance(content, bytes) else content


def file_path(reference: str) -> str:
    """Returns the path of a `file://` reference.

    Raises:
      InputError: It names a file of another machine.
    """
    host, slash, path = reference[len("file://") :].partition("/")
    if host.lower() not in ("", "localhost") or not slash:
        raise InputError(f"{printable(reference)}: names no file of this machine; write file:///folder/file")
    return urllib.parse.unquote(f"/{path}", errors="surrogateescape")


def data_content(reference: str) -> bytes:
    """Returns the content of a `data:` reference (RFC 2397).

    Raises:
      InputError: It is not base64 where it says so, or holds nothing.
    """
    header, _, text = reference.partition(",")
    content = urllib.parse.unquote_to_bytes(text.encode(errors="surrogatepass"))  # halves of characters are no base64
    if header.lower().endswith(";base64"):
        content = b"".join(content.split())
        try:
            content = base64.b64decode(content + b"=" * (-len(content) % 4), validate=True)
        except binascii.Error as error:
            raise InputError(f"{printable(reference, 60)}: not base64 ({error}); encode the file again") from None
    if not content:
        raise InputError(f"{printable(reference, 60)}: holds no content; encode the file again")
    return content


def as_file(data: str | bytes) -> str | io.BytesIO:
    """Returns a path as it is, and bytes as a file."""
    return io.BytesIO(data) if isinstance(data, bytes) else data


def first_bytes(data: str | bytes, count: int) -> bytes:
    """Returns the first bytes of the file at a path, or of bytes."""
    if isinstance(data, bytes):
        return data[:count]
    with open(data, "rb") as file:
        return file.read(count)


def _is_pipe(source: Any) -> bool:
    scheme = scheme_of(source)
    if not isinstance(source, str | os.PathLike) or scheme not in (None, "file"):
        return False
    path = file_path(str(source)) if scheme else os.fsdecode(source)
    with contextlib.suppress(OSError, ValueError):  # opening it says what is wrong
        return stat.S_ISFIFO(os.stat(path).st_mode)
    return False


def _readable(path: str, files: str) -> str | bytes:
    """Returns the path of a file or folder that may be read, or the content of a pipe."""
    name = printable(path)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            os.scandir(path).close()
        elif stat.S_ISREG(status.st_mode):
            open(path, "rb").close()
        elif stat.S_ISFIFO(status.st_mode):
            return _pipe_content(path, name)
        else:
            raise InputError(f"{name}: is a device, not a {files}; give a file")
    except PermissionError:
        raise InputError(f"{name}: no permission to read it; change its permissions, or those of its folder") from None
    except (OSError, ValueError) as error:  # ValueError: a character that no path may hold
        reason = error.strerror if isinstance(error, OSError) else None
        missing = isinstance(error, FileNotFoundError | NotADirectoryError | ValueError)
        text = f"no such {files}" if missing else f"cannot be read ({reason})"
        raise InputError(f"{name}: {text}; check the path") from None
    if stat.S_ISREG(status.st_mode) and not status.st_size:
        raise InputError(f"{name}: the file is empty (0 bytes); replace it")
    # FFmpeg takes what stands before a colon for a protocol, unless a folder comes first.
    return path if os.path.isabs(path) else os.path.join(os.curdir, path)


def _pipe_content(path: str, name: str) -> bytes:
    pieces, size = [], 0
    with open(path, "rb") as pipe:
        while piece := pipe.read(_PIECE):
            size += len(piece)
            if size > MAX_PIPE_BYTES:
                raise InputError(f"{name}: more than {MAX_PIPE_BYTES:,} bytes came through the pipe; give a file")
            pieces.append(piece)
    if not size:
        raise InputError(f"{name}: nothing came through the pipe; a pipe can be read only once")
    return b"".join(pieces)
