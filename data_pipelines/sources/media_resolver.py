"""Resolves the media that a record names: files below a folder or URL, members of a shard, bytes in the record."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.sample_errors import BAD_RECORD, MISSING, OUTSIDE, UNREADABLE, BadSampleError, one_line
from vl3_jax.errors import InputError, printable
from vl3_jax.processing.media_source import data_content, file_path, scheme_of
from vl3_jax.processing.remote_media import REMOTE_SCHEMES, RemotePolicy, fetch


@dataclasses.dataclass(frozen=True)
class MediaResolver:
    """Resolves media names relative to `root`, a local folder or a URL that fsspec reads (gs://bucket/folder).

    Attributes:
      root: The media folder; empty is the working folder.
      outside: Whether names may lead out of it: absolute ones, `..`, file:// and other URLs than http(s).
      remote: How http(s):// addresses are fetched; None refuses them.
    """

    root: str = ""
    outside: bool = False
    remote: RemotePolicy | None = None

    @property
    def identity(self) -> list[Any]:
        """The folder, and which other media may be read, as JSON values."""
        return [self.root if "://" in self.root else os.path.abspath(self.root), self.outside, self.remote is not None]

    def resolve(self, value: Any, kind: str) -> Any:
        """Resolves the value of a record's media field to something that `Processor` can open.

        Args:
          value: A path or address; bytes; pixels; {"path": ..., "bytes": ...}; for a video also a list of images.
          kind: "image" or "video", for error messages.

        Returns:
          A local path, the content of a remote or embedded file, pixels, or a list of resolved images.

        Raises:
          BadSampleError: The file is missing or cannot be fetched, the name leads out of the media folder, or the value
            is none of the above.
        """
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value)
        if isinstance(value, np.ndarray):
            return value
        if isinstance(value, Mapping):
            embedded = value.get("bytes")
            return self.resolve(value.get("path") if embedded is None else embedded, kind)
        if kind == "video" and isinstance(value, list | tuple) and value:
            return [self.resolve(frame, "image") for frame in value]
        if not isinstance(value, str) or not value:
            raise BadSampleError(BAD_RECORD, f'"{kind}" holds a {type(value).__name__}; give file names')
        scheme = scheme_of(value)
        if scheme == "data":
            return data_content(value)
        if scheme in REMOTE_SCHEMES:
            return self._fetched(value)
        path = self._path(value, scheme)
        if scheme == "file":
            path = file_path(path)
        elif "://" in path:
            if "::" in value:  # fsspec would go on to what follows: http://, whatever `remote` says
                raise BadSampleError(OUTSIDE, f"{printable(value)} chains file systems with ::; name one file", value)
            return _remote_bytes(path)
        if not os.path.exists(path):
            raise BadSampleError(MISSING, f"{path}; check the name and the media folder", path)
        return path

    def _path(self, name: str, scheme: str | None) -> str:
        """Returns the full path or URL of a name; without `outside` only one below the media folder."""
        if self.outside:
            return name if scheme or os.path.isabs(name) or not self.root else _joined(self.root, name)
        if scheme is None and not os.path.isabs(name):
            inside = os.path.normpath(name)  # opened as checked: `a/../b` is `b`, whatever `a` is
            if inside.split(os.sep)[0] != os.pardir:
                return _joined(self.root, inside) if self.root else inside
        elif scheme != "file" and ".." not in name.split("/"):
            root = self.root if scheme else os.path.abspath(self.root)
            if root and name.startswith(f"{root.rstrip('/')}/"):
                return name
        raise BadSampleError(
            OUTSIDE,
            f"{printable(name)} leads out of the media folder; name a file below it, or set `outside: true` of the "
            "data set (--allow-outside)",
            name,
        )

    def _fetched(self, address: str) -> Any:
        if self.remote is None:
            raise BadSampleError(
                OUTSIDE,
                f"{printable(address)} is on another machine; download it, or set `remote: true` of the data set "
                "(--allow-remote)",
                address,
            )
        try:
            return fetch(address, self.remote)
        except InputError as error:
            raise BadSampleError(UNREADABLE, one_line(error), address) from error


def _joined(root: str, name: str) -> str:
    return f"{root.rstrip('/')}/{name}" if "://" in root else os.path.join(root, name)


def _remote_bytes(url: str) -> bytes:
    import fsspec

    try:
        filesystem, key = fsspec.core.url_to_fs(url)
        return filesystem.cat_file(key)
    except FileNotFoundError:
        raise BadSampleError(MISSING, f"{url}; check the name and the media folder", url) from None
    except Exception as error:  # every filesystem of fsspec raises its own exceptions
        raise BadSampleError(UNREADABLE, f"{url}: {one_line(error)}", url) from error
