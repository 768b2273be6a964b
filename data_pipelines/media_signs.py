"""Signs of media that nothing would read: file names and content in unknown keys, placeholders of other models."""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.layouts import TAG_OF
from data_pipelines.sample_errors import TAGS, BadSampleError
from vl3_jax.processing import raster_file

# Endings of file names by the kind of medium. Some are known so that they are not overlooked, but not read, as sound.
SUFFIXES = {
    "image": (*raster_file.EXTENSIONS, ".heic", ".heif", ".jxl"),
    "video": (
        *(".mp4", ".m4v", ".webm", ".mkv", ".avi", ".mov", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".vob", ".flv"),
        *(".f4v", ".wmv", ".asf", ".3gp", ".3g2", ".ogv", ".mxf", ".rm", ".rmvb"),
    ),
    "audio": (".wav", ".mp3", ".flac", ".m4a", ".aac", ".ogg", ".opus", ".wma"),
}
_KIND_OF = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}
_MEDIA_WORD = re.compile(r"image|img|video|clip|audio|sound|speech|photo|picture|frame|depth|mask", re.IGNORECASE)
_MEDIA_KEY = re.compile(rf"(?:{_MEDIA_WORD.pattern})s?(?:_?(?:path|file|url|list)s?)?", re.IGNORECASE)
_SOUND_KEY = re.compile(r"audios?|sounds?|speech", re.IGNORECASE)
_MAX_NAME = 1024  # longer texts are no file names
_MAX_LEAVES = 1000

_WORD = r"(?:image|img|video|audio|speech|picture)"
PLACEHOLDER = re.compile(
    r"(?-i:<image>|<video>)"
    r"|<\|[^|<>\s]{0,30}(?:image|img|video|vision|audio|speech)[^|<>\s]{0,30}\|>"  # <|image_pad|>, <|vision_start|>
    rf"|(?<!\w)<{_WORD}[ _-]?\d*>"  # <Image>, <image_1>, <audio>; but not vector<Image>
    r"|<(?:image|video|img|im|vid|audio)[_-](?:\w+_)?(?:placeholder|pad|token|patch|start|end|context|newline|sep)>"
    r"|<(?:start|end)_of_(?:image|video|audio)>|<ImageHere>|</image>|</img>|\[IMG\]",
    re.IGNORECASE,
)


def kind_of(name: str) -> str | None:
    """Returns the kind of medium that a file name ends like, a key of `SUFFIXES`; None for any other name."""
    return _KIND_OF.get(os.path.splitext(name)[1].lower())


def is_image_name(entry: Any) -> bool:
    """Returns whether a medium is given by name, and is an image by its name."""
    return isinstance(entry, str) and kind_of(entry) == "image"


def find_placeholder(text: str, tags: Collection[str]) -> str | None:
    """Returns the first placeholder of a medium in a text, of this or another model, that is none of `tags`."""
    found = (match.group() for match in PLACEHOLDER.finditer(text))
    return next((placeholder for placeholder in found if placeholder not in tags), None)


def media_names(fields: Mapping[str, Any]) -> list[str]:
    """Returns the names of all media of a record, and "" for each that has only content.

    Raises:
      BadSampleError: A name is null or empty.
    """
    names = []
    for kind in TAG_OF:
        waiting = list(fields.get(kind, []))
        while waiting:
            entry = waiting.pop()
            if isinstance(entry, Mapping):
                names.append(entry["path"] if isinstance(entry.get("path"), str) else "")
                entry = entry.get("path") if entry.get("bytes") is None else entry["bytes"]
            elif isinstance(entry, list | tuple):
                waiting += entry
            else:
                names.append(entry if isinstance(entry, str) else "")
            if entry is None or (isinstance(entry, str | bytes | list | tuple) and not entry):
                given = "null" if entry is None else "an empty name"
                raise BadSampleError(TAGS, f'"{kind}" holds {given}; name the file, or leave out the key')
    return names


def names_unread_medium(key: str, value: Any, read: Sequence[str]) -> bool:
    """Returns whether a field of a record that nothing reads holds a medium or names one.

    What only tells where a medium came from (its URL, its name elsewhere) does not count.

    Args:
      key: Key of the field.
      value: Its value.
      read: Names of the media of the record that are read.
    """
    stems, word = {_stem(name) for name in read}, key.rsplit(".", 1)[-1]
    for leaf in _leaves(value):
        if isinstance(leaf, bytes | bytearray | np.ndarray):
            if len(leaf) and (isinstance(leaf, bytes | bytearray) or leaf.ndim > 1):
                return True
        elif isinstance(leaf, str) and 0 < len(leaf) <= _MAX_NAME:
            if _SOUND_KEY.fullmatch(word) or (not read and _MEDIA_KEY.fullmatch(word)):
                return True
            of_medium = _MEDIA_WORD.search(word)
            if kind_of(leaf) is None or (leaf.endswith(".ts") and not of_medium):  # .ts may be TypeScript
                continue
            if not read or ("://" not in leaf and of_medium and _stem(leaf) not in stems):
                return True
    return False


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]


def _leaves(value: Any) -> Iterator[Any]:
    """Yields the first values inside nested lists and objects."""
    waiting, count = [value], 0
    while waiting and count < _MAX_LEAVES:
        item, count = waiting.pop(), count + 1
        if isinstance(item, Mapping):
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item[:_MAX_LEAVES]
        else:
            yield item
