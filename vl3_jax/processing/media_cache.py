"""Decoded media by source and settings, so that later questions about the same ones decode nothing again."""

import collections
import hashlib
import os
import stat
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vl3_jax.errors import InputError
from vl3_jax.processing.media_source import MediaBytes, data_content, file_path, scheme_of
from vl3_jax.processing.messages import MediaPart, Turn
from vl3_jax.processing.processor_config import ProcessorConfig

if TYPE_CHECKING:
    from vl3_jax.processing.processor import DecodedMedia

CACHE_BYTES = 2**30
Key = tuple[Any, ...]


class MediaCache:
    """The media of the prompts that were used last. It may be used from several threads.

    A prompt's images and videos are kept together, because the size of each depends on the others. A file belongs to
    its entry as long as its size and its time of change stay the same.

    Args:
      most_bytes: Bytes of patches that are kept at most.
    """

    def __init__(self, most_bytes: int = CACHE_BYTES):
        self._most_bytes = most_bytes
        self._entries: collections.OrderedDict[Key, DecodedMedia] = collections.OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def key(self, turns: Sequence[Turn], config: ProcessorConfig) -> Key | None:
        """Returns what identifies the media of a prompt; None if there are none, or a source can be read only once."""
        parts = [part for turn in turns for part in turn.media]
        identities = [_identity(part) for part in parts]
        return (repr(config), *identities) if parts and None not in identities else None

    def get(self, key: Key) -> "DecodedMedia | None":
        """Returns the media of a key, or None if they are not there."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: Key, media: "DecodedMedia") -> None:
        """Keeps media, in place of those that were not used for longest."""
        with self._lock:
            if key in self._entries:
                self._bytes -= _size(self._entries.pop(key))
            self._entries[key] = media
            self._bytes += _size(media)
            while self._entries and self._bytes > self._most_bytes:
                self._bytes -= _size(self._entries.popitem(last=False)[1])


def _size(media: "DecodedMedia") -> int:
    return sum(visual.patches.nbytes for visual in media.visuals)


def _identity(part: MediaPart) -> Key | None:
    source = _source_identity(part.source)
    return None if source is None else (part.kind, source, repr(sorted(part.options.items())))


def _source_identity(source: Any) -> Key | None:
    """Returns what identifies the content of a source, or None where it cannot be told without reading it."""
    if isinstance(source, MediaBytes):
        return source.name, _digest(source.data)
    if isinstance(source, bytes | bytearray | memoryview):
        return (_digest(source),)
    if isinstance(source, str | os.PathLike):
        return _named_identity(source)
    if isinstance(source, list | tuple):
        identities = tuple(_source_identity(item) for item in source)
        return None if None in identities else identities
    if isinstance(source, np.ndarray):
        return source.shape, str(source.dtype), _digest(np.ascontiguousarray(source).data)
    return None


def _named_identity(source: str | os.PathLike) -> Key | None:
    try:
        scheme, path = scheme_of(source), os.fsdecode(source)
        if scheme == "data":
            return (_digest(data_content(path)),)
        if scheme not in (None, "file"):
            return None
        path = os.path.abspath(file_path(path) if scheme else path)
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            with os.scandir(path) as entries:
                return path, *sorted((entry.name, *_stamp(entry.stat())) for entry in entries)
        return (path, *_stamp(status)) if stat.S_ISREG(status.st_mode) else None
    except (OSError, ValueError, InputError):  # opening it says what is wrong
        return None


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _digest(data: Any) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
