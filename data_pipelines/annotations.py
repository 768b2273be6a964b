"""Parses annotation records into conversations that `Processor` can read.

    {"image": ["l.png", "r.png"], "conversations": [{"from": "human", "value": "<image> and <image>: what changed?"},
                                                    {"from": "gpt", "value": "The lamp."}]}
    {"video": ["kite.mp4"], "conversations": [...]}            text only: neither key
    {"video": ["desk.mp4"], "stream": true, "start_time": 12.0, "end_time": 47.0,
     "conversation": [{"role": "user", "content": "...", "time": 12.0}, ...]}

Beyond this official layout and those of `layouts`, a record may hold both images and videos, and several videos. A tag
`<image>` or `<video>` in a human turn refers to the next medium of its kind; if the record has media of the other kind
only, and no tags of that kind, to the next of those. A record with any sign of a medium that would go unused is bad.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines import media_signs
from data_pipelines.layouts import CONVERSATIONS, TAG_OF, VIDEO_OPTIONS, is_stream, list_of_turns, official, shortened
from data_pipelines.record_counts import RecordCounts
from data_pipelines.record_turns import (
    STREAM_TURN_KEYS,
    TURN_KEYS,
    RecordTurn,
    read_number,
    read_stream_turn,
    read_text,
    read_turn,
)
from data_pipelines.sample_errors import BAD_RECORD, EMPTY, TAGS, TOO_LONG, BadSampleError, one_line
from data_pipelines.sources.media_resolver import MediaResolver
from vl3_jax.errors import InputError
from vl3_jax.processing.messages import Turn, parse_messages

MAX_CHARACTERS = 2**20  # of the text of a sample; to tokenise more takes seconds, and no row holds it
_TIMES = ("start_time", "end_time", "timestamps")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One training sample before its media are read.

    Attributes:
      turns: Its messages; for a stream, a single message with the video only.
      counts: What was read from the record.
      stream: The turns of a live stream, sorted by time; empty for any other sample.
      stream_start: Start of the stream's clock, in seconds of the video file.
    """

    turns: list[Turn]
    counts: RecordCounts
    stream: tuple[RecordTurn, ...] = ()
    stream_start: float = 0.0


def parse_conversation(record: Mapping[str, Any], media: MediaResolver, fps: float = 1.0) -> Conversation:
    """Parses one record: the only way from a record to its messages, whatever they are needed for.

    Args:
      record: The record as parsed from the file.
      media: Resolves the media that the record names.
      fps: Sampled frames per second; the video of a stream is cut after the last frame before its last turn.

    Raises:
      BadSampleError: The record is malformed, would leave a medium unused, or names missing media.
    """
    fields = official(record)
    names, unread = media_signs.media_names(fields), _unread(fields)
    for key, value in unread:
        if media_signs.names_unread_medium(key, value, names):
            reason = f'nothing reads the medium in "{key}"'
            raise BadSampleError(TAGS, f'{reason}; name it in "image" or "video", or remove it')
    if is_stream(fields):
        return _stream(fields, media, fps, unread)
    return _conversation(fields, media, unread)


def _conversation(fields: Mapping[str, Any], media: MediaResolver, unread: Sequence[tuple[str, Any]]) -> Conversation:
    entries = list_of_turns(fields, CONVERSATIONS)
    given = [*_system(fields), *map(read_turn, entries)]
    question = next((index for index, turn in enumerate(given) if turn.role == "user"), len(given))
    left_out = [turn for turn in given[:question] if turn.role != "system"]
    turns = [turn for turn in given[:question] if turn.role == "system"] + given[question:]
    if len(turns) < 2:
        raise BadSampleError(EMPTY, f"{len(turns)} turns from the first question on; a sample needs two")
    _check_texts(turns, tags_of="user")
    parts = {kind: _parts(fields, kind, media) for kind in TAG_OF}
    leading, queues = _assign(turns, parts)
    messages = []
    for turn in turns:
        content = _split(turn.text, queues) if turn.role == "user" else [turn.text]
        if turn.role == "user" and leading:
            content, leading = [*leading, *content], []
        messages.append({"role": "user" if turn.role == "tool" else turn.role, "content": content})
    parsed = [
        dataclasses.replace(message, learned=turn.learned)
        for message, turn in zip(_parsed(messages), turns, strict=True)
    ]
    return Conversation(parsed, _counts(parts, turns, left_out, unread))


def _stream(
    fields: Mapping[str, Any], media: MediaResolver, fps: float, unread: Sequence[tuple[str, Any]]
) -> Conversation:
    entries = list_of_turns(fields, "conversation")
    turns = sorted([*_system(fields), *map(read_stream_turn, entries)], key=lambda turn: turn.time)
    _check_texts(turns, tags_of=None)
    parts = {kind: _parts(fields, kind, media) for kind in TAG_OF}
    videos = parts["video"]
    if len(videos) != 1 or parts["image"]:
        raise BadSampleError(BAD_RECORD, f"a stream of {len(videos)} videos; give exactly one and no images")
    start = videos[0].get("start", 0.0)
    last = turns[-1].time
    if last < start:
        raise BadSampleError(BAD_RECORD, f"all turns are before the video's start {start}; give seconds of the file")
    # Frames after the last turn are never used, so the video ends right after the last frame before that turn.
    end = start + max((math.floor((last - start) * fps) + 1) / fps, 1.0)
    videos[0]["end"] = min(videos[0].get("end", end), end)
    messages = _parsed([{"role": "user", "content": videos}])
    return Conversation(messages, _counts(parts, turns, [], unread), tuple(turns), start)


def _system(fields: Mapping[str, Any]) -> list[RecordTurn]:
    """Returns the turn that the key `system` stands for, before any time of a stream."""
    if not fields.get("system"):
        return []
    turns = fields[_turns_key(fields)]
    if any(isinstance(turn, Mapping) and "system" in (turn.get("from"), turn.get("role")) for turn in turns):
        raise BadSampleError(BAD_RECORD, 'both "system" and a turn of this role; give one of them')
    return [RecordTurn("system", read_text(fields["system"]), False, -math.inf)]


def _check_texts(turns: Sequence[RecordTurn], tags_of: str | None) -> None:
    """Checks lengths, that there is something to learn, and that tags of media are in turns of `tags_of` only."""
    characters = sum(len(turn.text) for turn in turns)
    if characters > MAX_CHARACTERS:
        raise BadSampleError(TOO_LONG, f"{characters:,} characters of text, the most are {MAX_CHARACTERS:,}; split it")
    if any(turn.role == "assistant" and not turn.text.strip() for turn in turns):
        raise BadSampleError(BAD_RECORD, "an empty answer, which would teach to end the turn only; write or remove it")
    if not any(turn.learned for turn in turns):
        raise BadSampleError(EMPTY, 'no answer is learned; add a turn of "gpt", or leave out its "loss"')
    for turn in turns:
        tags = TAG_OF.values() if turn.role == tags_of else ()
        placeholder = media_signs.find_placeholder(turn.text, tags)
        if placeholder:
            reason = f"{placeholder} in a turn of the {turn.role} is no tag of a medium"
            where = "<image> and <video> are, in turns of the user" if tags_of else "a stream needs no tags"
            raise BadSampleError(TAGS, f"{reason}; {where}")


def _assign(turns: Sequence[RecordTurn], parts: Mapping[str, list[Any]]) -> tuple[list[Any], dict[str, Iterator[Any]]]:
    """Returns the media that have no tags, and for each tag the media that replace it in order."""
    texts = [turn.text for turn in turns if turn.role == "user"]
    counts = {kind: sum(text.count(tag) for text in texts) for kind, tag in TAG_OF.items()}
    tags, (image, video) = dict(TAG_OF), TAG_OF
    for kind, other in ((image, video), (video, image)):
        if parts[kind] and not parts[other] and not counts[kind]:  # the tags of the other kind are meant for this one
            tags[kind], counts = TAG_OF[other], {kind: counts[other], other: 0}
    leading, queues = [], {}
    for kind, media in parts.items():
        if not counts[kind]:
            leading += media
        elif counts[kind] == len(media):
            queues[tags[kind]] = iter(media)
        else:
            raise BadSampleError(
                TAGS,
                f"{counts[kind]} {tags[kind]} for {len(media)} {kind} files; name each file and write one tag for it",
            )
    return leading, queues


def _split(text: str, queues: Mapping[str, Iterator[Any]]) -> list[Any]:
    """Splits a text at its tags into text and media parts; texts are stripped and empty ones dropped."""
    pieces = re.split("(" + "|".join(map(re.escape, queues)) + ")", text) if queues else [text]
    return [next(queues[piece]) if piece in queues else piece.strip() for piece in pieces if piece.strip()]


def _parts(fields: Mapping[str, Any], kind: str, media: MediaResolver) -> list[dict[str, Any]]:
    """Returns the media of one kind as message parts."""
    entries, options = fields.get(kind, []), {}
    if kind == "video" and len(entries) > 1 and all(media_signs.is_image_name(entry) for entry in entries):
        raise BadSampleError(BAD_RECORD, f'"video" lists {len(entries)} images; write frames of one video as [[...]]')
    if kind == "video" and entries:
        options = {key: fields[key] for key in _TIMES if key in fields}
        if options and len(entries) > 1:
            reason = f"{next(iter(options))} with {len(entries)} videos; cut the video files instead"
            raise BadSampleError(BAD_RECORD, reason)
    parts = []
    for entry in entries:
        own = {key: entry[key] for key in VIDEO_OPTIONS if key in entry} if isinstance(entry, Mapping) else {}
        keys = [*own, *options]
        twice = next((key for key in keys if keys.count(key) > 1 or f"{key}_time" in keys), None)
        if twice:
            raise BadSampleError(BAD_RECORD, f"a video has {twice} twice; give it once")
        part = {key.removesuffix("_time"): _option(own | options, key) for key in own | options}
        parts.append({"type": kind, kind: media.resolve(entry, kind), **part})
    return parts


def _option(options: Mapping[str, Any], key: str) -> float | list[float]:
    if key != "timestamps":
        return read_number(options, key)
    if not isinstance(options[key], list | tuple):
        raise BadSampleError(BAD_RECORD, f'"{key}" is {shortened(options[key])}; give a list of seconds')
    return [read_number({key: time}, key) for time in options[key]]


def _parsed(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    try:
        return parse_messages(messages)
    except InputError as error:
        raise BadSampleError(BAD_RECORD, one_line(error)) from error


def _unread(fields: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns the keys and values of a record and its turns that nothing reads."""
    known = {"id", "stream", "system", _turns_key(fields), *TAG_OF, *(_TIMES if fields.get("video") else ())}
    turns, turn_keys = fields.get(_turns_key(fields)), STREAM_TURN_KEYS if is_stream(fields) else TURN_KEYS
    of_turns = [
        (f"turn.{key}", value)
        for turn in (turns if isinstance(turns, list | tuple) else ())
        for key, value in (turn.items() if isinstance(turn, Mapping) else ())
        if key not in turn_keys and value is not None
    ]
    return [(key, value) for key, value in fields.items() if key not in known] + of_turns


def _turns_key(fields: Mapping[str, Any]) -> str:
    return "conversation" if is_stream(fields) else CONVERSATIONS


def _counts(
    parts: Mapping[str, Sequence[Any]],
    turns: Sequence[RecordTurn],
    left_out: Sequence[RecordTurn],
    unread: Sequence[tuple[str, Any]],
) -> RecordCounts:
    return RecordCounts(
        1,
        len(parts["image"]),
        len(parts["video"]),
        learned=Counter(turn.role for turn in turns if turn.learned),
        shown=Counter(turn.role for turn in turns if not turn.learned),
        left_out=Counter(turn.role for turn in left_out),
        unknown_keys=Counter(sorted({key for key, _ in unread})),
    )
