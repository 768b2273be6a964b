"""Finds the media that a record names: files below a folder or URL, members of a shard, bytes in the record."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.sample_errors import BAD_RECORD, MISSING, UNREADABLE, BadSampleError


@dataclasses.dataclass(frozen=True)
class MediaResolver:
    """Media paths are relative to `root`, a local folder or a URL that fsspec reads (gs://bucket/folder)."""

    root: str = ""

    def find(self, value: Any, kind: str) -> Any:
        """What the Processor opens: a local path, the bytes of a remote or embedded file, pixels, or frames.

        Args:
          value: a path; bytes; pixels; {"path": ..., "bytes": ...}; for a video also a list of pictures.
          kind: "image" or "video", for messages.

        Raises:
          BadSampleError: not there, or not a medium.
        """
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value)
        if isinstance(value, np.ndarray):
            return value
        if isinstance(value, Mapping):
            embedded = value.get("bytes")
            return self.find(value.get("path") if embedded is None else embedded, kind)
        if kind == "video" and isinstance(value, list | tuple) and value:
            return [self.find(frame, "image") for frame in value]
        if not isinstance(value, str) or not value:
            raise BadSampleError(BAD_RECORD, f'"{kind}" holds a {type(value).__name__}; give file names')
        path = self.path_of(value)
        if "://" in path:
            return _remote_bytes(path)
        if not os.path.exists(path):
            raise BadSampleError(MISSING, f"{path}; check the name and the media folder", path)
        return path

    def path_of(self, name: str) -> str:
        """The full path or URL of a name in a record."""
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
    except Exception as error:  # each filesystem has its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadSampleError(UNREADABLE, f"{url}: {reason}", url) from error
