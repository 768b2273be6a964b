"""Rewrites records of other common layouts as the official one, so that all that follows knows a single layout.

    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}},
                                               {"type": "text", "text": "What?"}]},
                  {"role": "assistant", "content": "A pear."}]}
    {"images": [...], "messages": [{"role": "user", "content": "<image>What?"}, ...]}
    {"images": [...], "texts": [{"user": "What?", "assistant": "A pear."}]}
    {"image": "a.png", "caption": "A pear."}

Keys that no layout knows stay in the record, and those of a turn in the turn, so that they can be counted.
"""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.sample_errors import BAD_RECORD, EMPTY, TAGS, BadSampleError, one_line
from vl3_jax.errors import InputError
from vl3_jax.processing.media_source import data_content, scheme_of

TAG_OF = {"image": "<image>", "video": "<video>"}
VIDEO_OPTIONS = ("fps", "max_frames", "start", "end", "start_time", "end_time", "timestamps")
CONVERSATIONS = "conversations"

_TURNS = (CONVERSATIONS, "messages", "texts")
_RENAMED = {"role": "from", "content": "value", "weight": "loss"}
_PART_KEYS = ("type", "text", "detail")
_LISTED = object()  # a part stands for the next medium of the record's own list


def official(record: Any) -> dict[str, Any]:
    """Returns a record in the official layout; one that has it already is copied.

    Args:
      record: A record as parsed from its file.

    Returns:
      The record, whose `image` and `video` are lists if it has media of the kind. Unless it is a live stream, its turns
      are in `conversations`, each with `from`, `value` and perhaps `loss`.

    Raises:
      BadSampleError: The record has no known layout, or several at once.
    """
    if not isinstance(record, Mapping):
        raise BadSampleError(BAD_RECORD, f"a {type(record).__name__}; each record is an object {{...}}")
    fields = {key: value for key, value in record.items() if value is not None}
    for kind in TAG_OF:
        for key in (kind, f"{kind}s"):
            if isinstance(fields.get(key), list | tuple) and not fields[key]:
                del fields[key]
        if f"{kind}s" in fields:
            if kind in fields:
                raise BadSampleError(BAD_RECORD, f'both "{kind}" and "{kind}s"; give one of them')
            fields[kind] = fields.pop(f"{kind}s")
        if kind in fields:
            fields[kind] = [_decoded(entry) for entry in as_list(fields[kind])]
    if is_stream(fields):
        return fields
    found = [key for key in _TURNS if key in fields]
    if len(found) > 1:
        raise BadSampleError(BAD_RECORD, f'both "{found[0]}" and "{found[1]}"; give one of them')
    if found:
        media: dict[str, list[Any]] = {kind: [] for kind in TAG_OF}
        convert = _question_and_answer if found[0] == "texts" else _message
        turns = list_of_turns(fields, found[0])
        fields[CONVERSATIONS] = [turn for entry in turns for turn in convert(entry, media)]
        _add_media(fields, media)
    elif isinstance(fields.get("caption"), str) and any(map(fields.get, TAG_OF)):
        answer = fields.pop("caption").strip()
        fields[CONVERSATIONS] = [{"from": "human", "value": ""}, {"from": "gpt", "value": answer}]
    else:
        keys = ", ".join(map(str, fields)) or "none"
        raise BadSampleError(BAD_RECORD, f'no "{CONVERSATIONS}", "messages" or "texts"; the keys are {keys}')
    return {key: value for key, value in fields.items() if key == CONVERSATIONS or key not in found}


def has_turns(record: Mapping[str, Any]) -> bool:
    """Returns whether a record has turns in any of the layouts, so that a caption is none of them."""
    return any(record.get(key) is not None for key in (*_TURNS, "conversation"))


def is_stream(fields: Mapping[str, Any]) -> bool:
    """Returns whether a record is a live stream.

    Raises:
      BadSampleError: `stream` is neither true nor false.
    """
    value = fields.get("stream") or False
    if value not in (False, True) or isinstance(value, str):
        raise BadSampleError(BAD_RECORD, f'"stream" is {shortened(value)}; give true or false')
    return bool(value)


def list_of_turns(fields: Mapping[str, Any], key: str) -> Sequence[Any]:
    """Returns the list of turns in a field, which may be an object of lists, as tables store a list of objects.

    Raises:
      BadSampleError: It is neither, or it is empty.
    """
    turns = fields.get(key)
    if isinstance(turns, Mapping) and all(isinstance(column, list | tuple) for column in turns.values()):
        if len(set(map(len, turns.values()))) > 1:
            raise BadSampleError(
                BAD_RECORD, f'the columns of "{key}" have different lengths; write it as a list of turns'
            )
        turns = [dict(zip(turns, row, strict=True)) for row in zip(*turns.values(), strict=True)]
    if isinstance(turns, str | bytes) or not isinstance(turns, Sequence):
        raise BadSampleError(BAD_RECORD, f'"{key}" is {shortened(turns)}; give a list of turns')
    if not turns:
        raise BadSampleError(EMPTY, f'"{key}" is an empty list; give a question and an answer')
    return turns


def as_list(value: Any) -> list[Any]:
    """Returns the media of a field as a list: those of a list, or the single one."""
    return list(value) if isinstance(value, list | tuple) else [value]


def shortened(value: Any) -> str:
    """Returns the start of a value's representation, whatever its size and depth."""
    try:
        text = reprlib.repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a value with a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def _message(turn: Any, media: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Converts a turn with `from` and `value`, or `role` and `content`; adds the media of its parts to `media`."""
    example = '{"from": "human", "value": "..."}'
    if not isinstance(turn, Mapping):
        raise BadSampleError(BAD_RECORD, f"a turn is {shortened(turn)}; give {example}")
    call = next((key for key in ("tool_calls", "function_call") if turn.get(key)), None)
    if call:
        raise BadSampleError(BAD_RECORD, f'"{call}" of a turn is not read; write the call as its content')
    twice = next((key for key in _RENAMED if turn.get(key) is not None and turn.get(_RENAMED[key]) is not None), None)
    if twice:
        raise BadSampleError(BAD_RECORD, f'both "{twice}" and "{_RENAMED[twice]}" in a turn; give one of them')
    fields = {_RENAMED.get(key, key): value for key, value in turn.items() if value is not None}
    if "from" not in fields or "value" not in fields:
        raise BadSampleError(BAD_RECORD, f"a turn is {shortened(turn)}; give {example}")
    parts = fields["value"]
    if not isinstance(parts, str):
        if not isinstance(parts, list | tuple):
            raise BadSampleError(BAD_RECORD, f"the text of a turn is {shortened(parts)}; give a string")
        fields["value"] = "".join(_part(part, media, fields) for part in parts)
    return [fields]


def _question_and_answer(entry: Any, _media: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Converts an entry of `texts`."""
    if not isinstance(entry, Mapping) or entry.get("user") is None or entry.get("assistant") is None:
        given = shortened(entry)
        raise BadSampleError(BAD_RECORD, f'an entry of "texts" is {given}; give {{"user": "...", "assistant": "..."}}')
    others = {key: value for key, value in entry.items() if key not in ("user", "assistant")}
    return [{"from": "human", "value": entry["user"]}, {**others, "from": "gpt", "value": entry["assistant"]}]


def _part(part: Any, media: dict[str, list[Any]], turn: dict[str, Any]) -> str:
    """Returns a part of a message as text: its text, or the tag of its medium, which is added to `media`."""
    if isinstance(part, str):
        return part
    fields = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    kind = fields.get("type") or next((key for key in ("text", *TAG_OF) if key in fields), None)
    if kind == "text" and isinstance(fields.get("text"), str):
        text, read = fields["text"], _PART_KEYS
    elif kind is None or kind == "text":
        raise BadSampleError(BAD_RECORD, f'a part is {shortened(part)}; give {{"type": "text", "text": "..."}}')
    elif isinstance(kind, str) and kind.removesuffix("_url") in TAG_OF:
        kind = kind.removesuffix("_url")
        named = (kind, f"{kind}_url", "url", "path")
        media[kind].append(_medium(fields, kind, named))
        text, read = TAG_OF[kind], {*_PART_KEYS, *named, *(VIDEO_OPTIONS if kind == "video" else ())}
    else:
        raise BadSampleError(TAGS, f"nothing reads a part of type {shortened(kind)}; use text, image or video")
    turn.update({f"part.{key}": value for key, value in fields.items() if key not in read})
    return text


def _medium(part: Mapping[str, Any], kind: str, named: Sequence[str]) -> Any:
    """Returns the medium of a part as an entry of `image` or `video`; `_LISTED` if the part does not name it."""
    sources = [part[key] for key in named if key in part]
    if len(sources) > 1:
        raise BadSampleError(BAD_RECORD, f"a part names several media, {shortened(part)}; give one of them")
    source, options = sources[0] if sources else _LISTED, part
    if isinstance(source, Mapping) and not {"bytes", "path"} & set(source):
        options = {**part, **source}
        source = source.get("url") or source.get(f"{kind}_path")
        if source is None:
            raise BadSampleError(BAD_RECORD, f"a part names its {kind} as {shortened(sources[0])}; give a file name")
    options = {key: options[key] for key in VIDEO_OPTIONS if options.get(key) is not None and kind == "video"}
    if not options:
        return _decoded(source)
    if source is _LISTED:
        raise BadSampleError(BAD_RECORD, f"a part has {next(iter(options))} but no {kind}; name the {kind} in it")
    source = _decoded(source)
    return {**(source if isinstance(source, Mapping) else {"path": source}), **options}


def _add_media(fields: dict[str, Any], media: Mapping[str, Sequence[Any]]) -> None:
    """Adds the media that parts name to those of the record."""
    for kind, entries in media.items():
        named = [entry for entry in entries if entry is not _LISTED]
        if named and (len(named) < len(entries) or fields.get(kind)):
            raise BadSampleError(BAD_RECORD, f'some of the {kind} files are in parts and some in "{kind}"; use one way')
        if named:
            fields[kind] = named


def _decoded(entry: Any) -> Any:
    """Returns a medium; the content of a `data:` URL instead of the URL."""
    if scheme_of(entry) != "data":
        return entry
    try:
        return {"path": entry.partition(",")[0], "bytes": data_content(entry)}
    except InputError as error:
        raise BadSampleError(BAD_RECORD, one_line(error)) from None
