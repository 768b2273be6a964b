"""Parses conversations: checks the messages and converts them to one form.

    [{"role": "user", "content": [{"type": "video", "video": "a.mp4", "fps": 1, "max_frames": 180},
                                  {"type": "image", "image": "b.png"},
                                  {"type": "text", "text": "What happens?"}]}]

Content is a string or a list of parts. A part is a string or one of the forms above. The nested form of the released
model, {"type": "video", "video": {"video_path": "a.mp4", "fps": 1}}, is accepted too.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.processing.video_reader import FrameSamplingOptions

ROLES = ("system", "user", "assistant", "stream")
_NOT_PER_VIDEO = ("preprocess", "threads")
_TIME_KEYS = ("time", "timestamp", "timestamps")
# Key of a video part: the option it sets. `timestamps` is apart, for frames that are chosen already.
_VIDEO_KEYS = {
    **{name: name for name in FrameSamplingOptions.__dataclass_fields__ if name not in _NOT_PER_VIDEO},
    "start_time": "start",
    "end_time": "end",
    "timestamps": "timestamps",
}
_IGNORED = ("type", "num_frames")  # the number of frames is known from the source


@dataclasses.dataclass(frozen=True)
class MediaPart:
    """An image or video in a message.

    Attributes:
      kind: "image" or "video".
      source: Path, bytes, array or any other source that the reader of this kind accepts.
      options: Options of a video (fps, max_frames, start, end, precise_time, timestamps); only those that are set.
      time: Time in seconds written before an image, or None.
    """

    kind: str
    source: Any
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    time: float | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
      role: One of `ROLES`.
      parts: Texts and media in order.
      learned: Whether training learns the message, if it is one of the assistant.
    """

    role: str
    parts: list[str | MediaPart]
    learned: bool = True

    @property
    def media(self) -> list[MediaPart]:
        return [part for part in self.parts if isinstance(part, MediaPart)]


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Checks a conversation and converts it to turns.

    Raises:
      InputError: A message is malformed; the error names the message and the problem.
    """
    if isinstance(messages, Mapping | str) or not isinstance(messages, Sequence) or not messages:
        raise InputError(
            'a conversation is a list of messages, [{"role": "user", "content": "..."}]; give at least one'
        )
    return [_parse_turn(message, f"message {number}") for number, message in enumerate(messages, start=1)]


def _parse_turn(message: Any, where: str) -> Turn:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise InputError(f'{where}: needs "role" and "content", like {{"role": "user", "content": "..."}}')
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise InputError(f"{where}: unknown role {role!r}; use one of {', '.join(ROLES)}")
    if isinstance(content, str | Mapping):
        content = [content]
    if not isinstance(content, Sequence):
        raise InputError(f"{where}: content has type {type(content).__name__}; give a string or a list of parts")
    return Turn(role, [_parse_part(part, f"{where}, part {number}") for number, part in enumerate(content, start=1)])


def _parse_part(part: Any, where: str) -> str | MediaPart:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise InputError(f"{where}: has type {type(part).__name__}; give a string or an object with a type")
    kind = part.get("type") or next((name for name in ("text", "image", "video") if name in part), None)
    if kind not in ("text", "image", "video"):
        raise InputError(f"{where}: unknown type {kind!r}; use text, image or video")
    if kind not in part:
        raise InputError(f'{where}: of type {kind} but without "{kind}"; add it')
    if kind == "text":
        if not isinstance(part["text"], str):
            raise InputError(f"{where}: text has type {type(part['text']).__name__}; give a string")
        return part["text"]
    extra = {key: value for key, value in part.items() if key != kind and key not in _IGNORED}
    source = part[kind]
    if isinstance(source, Mapping):
        nested = dict(source)
        if f"{kind}_path" not in nested:
            raise InputError(f'{where}: {kind} is an object without "{kind}_path"; add it')
        source = nested.pop(f"{kind}_path")
        extra = {**nested, **extra}
    return _parse_image(source, extra, where) if kind == "image" else _parse_video(source, extra, where)


def _parse_image(source: Any, extra: dict[str, Any], where: str) -> MediaPart:
    times = [extra.pop(key) for key in _TIME_KEYS if key in extra]
    _reject_unknown_keys(extra, _TIME_KEYS, where)
    time = times[0] if times else None
    if isinstance(time, Sequence) and not isinstance(time, str) and len(time) == 1:
        time = time[0]
    return MediaPart("image", source, time=None if time is None else _number(time, "time", where))


def _parse_video(source: Any, extra: dict[str, Any], where: str) -> MediaPart:
    options = {_VIDEO_KEYS[key]: value for key, value in extra.items() if key in _VIDEO_KEYS and value is not None}
    _reject_unknown_keys({key for key in extra if key not in _VIDEO_KEYS}, _VIDEO_KEYS, where)
    for name in ("fps", "start", "end"):
        if name in options:
            options[name] = _number(options[name], name, where)
    if "max_frames" in options:
        options["max_frames"] = int(_number(options["max_frames"], "max_frames", where))
    if "timestamps" in options:
        options["timestamps"] = [_number(time, "timestamps", where) for time in options["timestamps"]]
    return MediaPart("video", source, options)


def _reject_unknown_keys(unknown: Any, known: Any, where: str) -> None:
    if unknown:
        raise InputError(f"{where}: unknown key {sorted(unknown)[0]!r}; known are {', '.join(known)}")


def _number(value: Any, name: str, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {name} is {value!r}; give a number") from error
