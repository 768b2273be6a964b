"""Parses records in the official annotation format into conversations that `Processor` can read.

    {"image": ["l.png", "r.png"], "conversations": [{"from": "human", "value": "<image> and <image>: what changed?"},
                                                    {"from": "gpt", "value": "The lamp."}]}
    {"video": ["kite.mp4"], "conversations": [...]}            text only: neither key
    {"video": ["desk.mp4"], "stream": true, "start_time": 12.0, "end_time": 47.0,
     "conversation": [{"role": "user", "content": "...", "time": 12.0}, ...]}

Beyond the official format, a record may hold both images and videos, and several videos. A tag `<image>` or
`<video>` in a human turn refers to the next medium of its kind; if the record has no medium of that kind, the tag is
ordinary text.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.sample_errors import BAD_RECORD, EMPTY, TAGS, BadSampleError
from data_pipelines.sources.media_resolver import MediaResolver
from vl3_jax.processing.messages import Turn, parse_messages

TAG_OF = {"image": "<image>", "video": "<video>"}
_ROLES = {"human": "user", "user": "user", "system": "system"}  # any other is the assistant


@dataclasses.dataclass(frozen=True)
class StreamTurn:
    """One turn of a live stream.

    Attributes:
      role: "user", "assistant" or "system".
      text: What is said.
      time: When it is said, in seconds of the video file.
    """

    role: str
    text: str
    time: float


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One training sample before its media are read.

    Attributes:
      turns: Its messages; for a stream, a single message with the video only.
      stream: The turns of a live stream, sorted by time; empty for any other sample.
      stream_start: Start of the stream's clock, in seconds of the video file.
    """

    turns: list[Turn]
    stream: tuple[StreamTurn, ...] = ()
    stream_start: float = 0.0


def parse_conversation(record: Mapping[str, Any], media: MediaResolver, fps: float = 1.0) -> Conversation:
    """Parses one record: the only way from a record to its messages, whatever they are needed for.

    Args:
      record: The record as parsed from the file.
      media: Resolves the media that the record names.
      fps: Sampled frames per second; the video of a stream is cut after the last frame before its last turn.

    Raises:
      BadSampleError: The record is malformed or names missing media.
      InputError: An option of a medium is malformed.
    """
    if not isinstance(record, Mapping):
        raise BadSampleError(BAD_RECORD, f"a {type(record).__name__}; each record is an object {{...}}")
    if record.get("stream"):
        return _stream(record, media, fps)
    return Conversation(parse_messages(_messages(record, media)))


def _messages(record: Mapping[str, Any], media: MediaResolver) -> list[dict[str, Any]]:
    turns = [_turn(turn) for turn in _list_of_turns(record, "conversations")]
    turns = list(itertools.dropwhile(lambda turn: turn[0] == "assistant", turns))
    if len(turns) < 2:
        raise BadSampleError(EMPTY, f"{len(turns)} turns from the first question on; a sample needs two")
    if all(role != "assistant" for role, _ in turns):
        raise BadSampleError(EMPTY, 'no turn from "gpt", so nothing is supervised; add the answer')
    parts = {kind: _parts(record, kind, media) for kind in TAG_OF}
    leading, queues = [], {}
    for kind, tag in TAG_OF.items():
        media_count, count = len(parts[kind]), sum(text.count(tag) for role, text in turns if role == "user")
        if not media_count or not count:
            leading += parts[kind]
        elif count == media_count:
            queues[tag] = iter(parts[kind])
        else:
            raise BadSampleError(TAGS, f"{count} {tag} for {media_count} {kind} files; write one tag for each")
    messages = [{"role": role, "content": _split(text, queues) if role == "user" else [text]} for role, text in turns]
    if leading:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise BadSampleError(EMPTY, 'media but no turn from "human" to hold them; add the question')
        first["content"] = [*leading, *first["content"]]
    return messages


def _list_of_turns(record: Mapping[str, Any], key: str) -> Sequence[Any]:
    turns = record.get(key)
    if turns is None or isinstance(turns, str) or not isinstance(turns, Sequence):
        raise BadSampleError(BAD_RECORD, f'"{key}" is {_abbreviated(turns)}; give a list of turns')
    if not turns:
        raise BadSampleError(EMPTY, f'"{key}" is an empty list; give a question and an answer')
    return turns


def _turn(turn: Any) -> tuple[str, str]:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("from"), str):
        raise BadSampleError(BAD_RECORD, f'a turn is {_abbreviated(turn)}; give {{"from": "human", "value": "..."}}')
    text = turn.get("value")
    if not isinstance(text, str):
        raise BadSampleError(BAD_RECORD, f'the "value" of a turn is {_abbreviated(text)}; give a string')
    return _ROLES.get(turn["from"], "assistant"), text


def _split(text: str, queues: Mapping[str, Any]) -> list[Any]:
    """Splits a text at its tags into text and media parts; texts are stripped and empty ones dropped."""
    pieces = re.split("(" + "|".join(map(re.escape, queues)) + ")", text) if queues else [text]
    return [next(queues[piece]) if piece in queues else piece.strip() for piece in pieces if piece.strip()]


def _parts(record: Mapping[str, Any], kind: str, media: MediaResolver) -> list[dict[str, Any]]:
    """Returns the media of one kind as message parts."""
    entry = record.get(kind)
    if entry is None or (isinstance(entry, str | bytes | Sequence) and not entry):
        return []
    values = entry if isinstance(entry, list | tuple) else [entry]
    options = {}
    if kind == "video":
        options = {key: _seconds(record, key) for key in ("start_time", "end_time") if record.get(key) is not None}
        if options and len(values) > 1:
            raise BadSampleError(
                BAD_RECORD, f"{next(iter(options))} with {len(values)} videos; cut the video files instead"
            )
        if record.get("timestamps") is not None and len(values) == 1:
            options["timestamps"] = record["timestamps"]
    return [{"type": kind, kind: media.resolve(value, kind), **options} for value in values]


def _stream(record: Mapping[str, Any], media: MediaResolver, fps: float) -> Conversation:
    turns = sorted(map(_stream_turn, _list_of_turns(record, "conversation")), key=lambda turn: turn.time)
    if all(turn.role != "assistant" for turn in turns):
        raise BadSampleError(EMPTY, 'no turn of role "assistant", so nothing is supervised; add what the model says')
    videos = _parts(record, "video", media)
    if len(videos) != 1 or record.get("image"):
        raise BadSampleError(BAD_RECORD, f"a stream of {len(videos)} videos; give exactly one and no images")
    start = videos[0].get("start_time", 0.0)
    last = turns[-1].time
    if last < start:
        raise BadSampleError(BAD_RECORD, f"all turns are before start_time {start}; give times in seconds of the file")
    # Frames after the last turn are never used, so the video ends right after the last frame before that turn.
    end = start + max((math.floor((last - start) * fps) + 1) / fps, 1.0)
    videos[0]["end_time"] = min(videos[0].get("end_time", end), end)
    return Conversation(parse_messages([{"role": "user", "content": videos}]), tuple(turns), start)


def _stream_turn(turn: Any) -> StreamTurn:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
        raise BadSampleError(
            BAD_RECORD, f'a turn is {_abbreviated(turn)}; give {{"role": "user", "content": "...", "time": 1.0}}'
        )
    if turn.get("role") not in ("user", "assistant", "system"):
        raise BadSampleError(BAD_RECORD, f"role {turn.get('role')!r} in a stream; use user, assistant or system")
    return StreamTurn(turn["role"], turn["content"], _seconds(turn, "time"))


def _seconds(record: Mapping[str, Any], key: str) -> float:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadSampleError(BAD_RECORD, f'"{key}" is {_abbreviated(value)}; give seconds')
    return float(value)


def _abbreviated(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
