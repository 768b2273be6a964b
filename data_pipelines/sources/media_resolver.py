"""Resolves the media that a record names: files below a folder or URL, members of a shard, bytes in the record."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.sample_errors import BAD_RECORD, MISSING, UNREADABLE, BadSampleError, one_line


@dataclasses.dataclass(frozen=True)
class MediaResolver:
    """Resolves media names relative to `root`, a local folder or a URL that fsspec reads (gs://bucket/folder)."""

    root: str = ""

    def resolve(self, value: Any, kind: str) -> Any:
        """Resolves the value of a record's media field to something that `Processor` can open.

        Args:
          value: A path; bytes; pixels; {"path": ..., "bytes": ...}; for a video also a list of images.
          kind: "image" or "video", for error messages.

        Returns:
          A local path, the bytes of a remote or embedded file, pixels, or a list of resolved images.

        Raises:
          BadSampleError: The file is missing or cannot be fetched, or the value is none of the above.
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
        path = self.resolve_path(value)
        if "://" in path:
            return _remote_bytes(path)
        if not os.path.exists(path):
            raise BadSampleError(MISSING, f"{path}; check the name and the media folder", path)
        return path

    def resolve_path(self, name: str) -> str:
        """Returns the full path or URL of a name in a record."""
        if "://" in name or os.path.isabs(name) or not self.root:
            return name
        return f"{self.root.rstrip('/')}/{name}" if "://" in self.root else os.path.join(self.root, name)


def _remote_bytes(url: str) -> bytes:
    import fsspec

    try:
        filesystem, key = fsspec.core.url_to_fs(url)
        return filesystem.cat_file(key)
    except FileNotFoundError:
        raise BadSampleError(MISSING, f"{url}; check the name and the media folder", url) from None
    except Exception as error:  # every filesystem of fsspec raises its own exceptions
        raise BadSampleError(UNREADABLE, f"{url}: {one_line(error)}", url) from error
