"""Parses conversations: checks the messages and converts them to one form.

    [{"role": "user", "content": [{"type": "video", "video": "a.mp4", "fps": 1, "max_frames": 180},
                                  {"type": "image", "image": "b.png"},
                                  {"type": "text", "text": "What happens?"}]}]

Content is a string or a list of parts. A part is a string or one of the forms above. Other forms in use are read too:
the nested one of the released model, {"type": "video", "video": {"video_path": "a.mp4", "fps": 1}}; {"type":
"image_url", "image_url": {"url": "..."}} and "video_url"; and the keys "url", "path" and "base64" of transformers.
A key that is not known is refused, and so is a setting given twice.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vl3_jax.config_tree import Limits
from vl3_jax.errors import InputError, printable, repr_of
from vl3_jax.processing.processor_config import COUNT, FPS, SECONDS
from vl3_jax.processing.video_reader import FrameSamplingOptions

ROLES = ("system", "user", "assistant", "stream")
_KINDS = {"text": "text", "image": "image", "image_url": "image", "video": "video", "video_url": "video"}
_NOT_PER_VIDEO = ("preprocess", "threads")
# Key of a part: what it sets, by kind.
_OPTIONS = {
    "image": {
        **{"time": "time", "timestamp": "time", "timestamps": "time", "num_frames": "num_frames"},
        "inline": "inline",  # no line break after it
    },
    "video": {
        **{name: name for name in FrameSamplingOptions.__dataclass_fields__ if name not in _NOT_PER_VIDEO},
        "start_time": "start",
        "end_time": "end",
        "timestamps": "timestamps",  # of frames that are chosen already
        "num_frames": "num_frames",
        "inserts": "inserts",  # texts between frames, each as [number of frames before it, text]
    },
}
_LIMITS = {"fps": FPS, "max_frames": COUNT, "start": SECONDS, "end": SECONDS}
_SOURCE_KEYS = ("url", "path", "base64")  # besides the name of the kind


@dataclasses.dataclass(frozen=True)
class MediaPart:
    """An image or video in a message.

    Attributes:
      kind: "image" or "video".
      source: Path, bytes, array or any other source that the reader of this kind accepts.
      options: Options of a video (fps, max_frames, start, end, precise_time, timestamps); only those that are set.
      time: Time in seconds written before an image, or None.
      inline: Whether no line break follows an image.
      inserts: Texts between the frames of a video in order, each with the number of frames before it.
    """

    kind: str
    source: Any
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    time: float | None = None
    inline: bool = False
    inserts: Sequence[tuple[int, str]] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """A part of an image that comes before it in the conversation: what the image shows there is repeated.

    Attributes:
      mask: The region, [h, w] bool, at any size.
      medium: Number of the image among all images and videos of the conversation, from 0.
    """

    mask: np.ndarray
    medium: int = 0


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
      role: One of `ROLES`.
      parts: Texts, media and regions in order.
      learned: Whether training learns the message, if it is one of the assistant.
    """

    role: str
    parts: list[str | MediaPart | Region]
    learned: bool = True

    @property
    def media(self) -> list[MediaPart]:
        return [part for part in self.parts if isinstance(part, MediaPart)]


def parse_messages(messages: Sequence[Mapping[str, Any] | Turn]) -> list[Turn]:
    """Checks a conversation and converts it to turns; messages that are turns already stay as they are.

    Raises:
      InputError: A message is malformed; the error names the message and the problem.
    """
    if isinstance(messages, Mapping | str) or not isinstance(messages, Sequence) or not messages:
        raise InputError(
            'a conversation is a list of messages, [{"role": "user", "content": "..."}]; give at least one'
        )
    return [
        message if isinstance(message, Turn) else _parse_turn(message, f"message {number}")
        for number, message in enumerate(messages, start=1)
    ]


def _parse_turn(message: Any, where: str) -> Turn:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise InputError(f'{where}: needs "role" and "content", like {{"role": "user", "content": "..."}}')
    _reject_unknown_keys(message, ("role", "content"), where)
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise InputError(f"{where}: unknown role {_shown(role)}; use one of {', '.join(ROLES)}")
    if isinstance(content, str | Mapping):
        content = [content]
    if not isinstance(content, Sequence):
        raise InputError(f"{where}: content has type {type(content).__name__}; give a string or a list of parts")
    return Turn(role, [_parse_part(part, f"{where}, part {number}") for number, part in enumerate(content, start=1)])


def _parse_part(part: Any, where: str) -> str | MediaPart:
    if isinstance(part, str):
        return _text(part, where)
    if not isinstance(part, Mapping):
        raise InputError(f"{where}: has type {type(part).__name__}; give a string or an object with a type")
    part_type = part["type"] if "type" in part else next((name for name in _KINDS if name in part), None)
    if not isinstance(part_type, str) or part_type not in _KINDS:
        raise InputError(f"{where}: unknown type {_shown(part_type)}; use text, image or video")
    kind = _KINDS[part_type]
    values = {key: value for key, value in part.items() if key != "type"}
    if kind == "text":
        _reject_unknown_keys(values, ("text",), where)
        return _text(values.get("text"), where)
    source, options = _parse_medium(kind, values, where)
    time, inline, inserts = options.pop("time", None), options.pop("inline", False), options.pop("inserts", ())
    return MediaPart(kind, source, options, time, inline, inserts)


def _text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"{where}: text has type {type(text).__name__}; give a string")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where}: character {error.start + 1} of the text is {_shown(text[error.start])}, one half of a "
                "character; write the text in UTF-8"
            ) from None
    return text


def _parse_medium(kind: str, values: dict[str, Any], where: str) -> tuple[Any, dict[str, Any]]:
    """Returns the source of an image or video and its options, from the keys of a part and of an object inside it."""
    source = _take_source(kind, values, (kind, f"{kind}_url", *_SOURCE_KEYS), where)
    given = list(values.items())
    if isinstance(source, Mapping):
        nested = dict(source)
        source = _take_source(kind, nested, (f"{kind}_path", *_SOURCE_KEYS), where)
        given += nested.items()
    options: dict[str, Any] = {}
    for key, value in given:
        if key == "detail" and value == "auto":  # of OpenAI's image_url; "auto" asks for nothing
            continue
        _reject_unknown_keys([key], _OPTIONS[kind], where)
        name = _OPTIONS[kind][key]
        if value is None:
            continue
        if name in options:
            raise InputError(f"{where}: {key} sets {name}, which is given twice; leave one of them out")
        options[name] = _option(kind, name, value, key, where)
    _check_num_frames(kind, source, options.pop("num_frames", None), where)
    return source, options


def _take_source(kind: str, values: dict[str, Any], keys: Sequence[str], where: str) -> Any:
    """Removes the source of a medium from its keys and returns it."""
    present = [key for key in keys if key in values]
    if not present:
        quoted = " or ".join(f'"{key}"' for key in (keys[0], *_SOURCE_KEYS[:2]))
        raise InputError(f"{where}: a{'n' if kind == 'image' else ''} {kind} without {quoted}; add one")
    if len(present) > 1:
        raise InputError(f"{where}: both {present[0]} and {present[1]} name the {kind}; leave one of them out")
    source = values.pop(present[0])
    return f"data:;base64,{source}" if present[0] == "base64" else source


def _option(kind: str, name: str, value: Any, key: str, where: str) -> Any:
    """Returns the value of an option, checked and in its type."""
    if name == "inserts":
        return _inserts(value, key, where)
    if name in ("precise_time", "inline"):
        if not isinstance(value, bool):
            raise InputError(f"{where}: {key} is {_shown(value)}; give true or false")
        return value
    if name == "timestamps":
        if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
            raise InputError(f"{where}: {key} is {_shown(value)}; give a list with the time of each frame in seconds")
        return [_number(time, key, where) for time in value]
    if kind == "image" and isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
        value = value[0]  # the released form: a list with the time of the one image
    number = _number(value, key, where)
    whole, limits = name in ("max_frames", "num_frames"), _LIMITS.get(name, Limits())
    if (whole and number != int(number)) or number not in limits:
        raise InputError(f"{where}: {key} is {_shown(value)}; give a {'whole ' * whole}number {limits}".rstrip())
    return int(number) if whole else number


def _inserts(value: Any, key: str, where: str) -> list[tuple[int, str]]:
    """Returns the texts between frames, checked."""
    try:
        inserts = [(int(count), _text(text, where)) for count, text in value]
    except (TypeError, ValueError):
        raise InputError(f"{where}: {key} is {_shown(value)}; give pairs of a number of frames and a text") from None
    counts = [count for count, _ in inserts]
    if counts != sorted(counts) or min(counts, default=0) < 0:
        raise InputError(f"{where}: {key} is {_shown(value)}; give the numbers of frames in ascending order, from 0")
    return inserts


def _check_num_frames(kind: str, source: Any, stated: int | None, where: str) -> None:
    """Refuses a number of frames that differs from what is there: it states, and does not select."""
    if stated is None:
        return
    if kind == "video" and not (isinstance(source, list | tuple) or hasattr(source, "__array__")):
        raise InputError(f"{where}: num_frames belongs to frames that are chosen already; use max_frames or fps")
    count = 1 if kind == "image" else len(source)
    if stated != count:
        raise InputError(f"{where}: num_frames is {stated}, but there are {count} frames; leave it out")


def _reject_unknown_keys(keys: Iterable[Any], known: Iterable[str], where: str) -> None:
    for key in keys:
        if key not in known:
            raise InputError(f"{where}: unknown key {_shown(key)}; known are {', '.join(known)}")


def _number(value: Any, name: str, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where}: {name} is {_shown(value)}; give a number")
    return number


def _shown(value: Any) -> str:
    return printable(repr_of(value))
