"""Reads the turns of records: who speaks, what is said, and whether it is learned."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from data_pipelines.layouts import shortened
from data_pipelines.sample_errors import BAD_RECORD, NOT_UTF8, BadSampleError
from vl3_jax.processing.video_reader import MAX_FPS, MAX_SECONDS

# The closed list of roles. Tool results are shown to the model as turns of the user.
_ROLES = {
    "human": "user",
    "user": "user",
    "system": "system",
    "developer": "system",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
_STREAM_ROLES = ("user", "assistant", "system")

TURN_KEYS = {"from", "value", "loss"}
STREAM_TURN_KEYS = {"role", "content", "time", "loss"}


@dataclasses.dataclass(frozen=True)
class RecordTurn:
    """One turn of a record.

    Attributes:
      role: "user", "assistant", "system" or "tool"; the last is shown to the model as a turn of the user.
      text: What is said.
      learned: Whether the text is learned.
      time: In a live stream, when it is said, in seconds of the video file.
    """

    role: str
    text: str
    learned: bool
    time: float = 0.0


def read_turn(entry: Mapping[str, Any]) -> RecordTurn:
    """Reads a turn with `from`, `value` and perhaps `loss`.

    Raises:
      BadSampleError: The role is none of the list, or a value is malformed.
    """
    role = entry["from"]
    if not isinstance(role, str) or role not in _ROLES:
        raise BadSampleError(BAD_RECORD, f"unknown role {shortened(role)}; use one of {', '.join(_ROLES)}")
    return RecordTurn(_ROLES[role], read_text(entry["value"]), _learned(entry, _ROLES[role]))


def read_stream_turn(entry: Any) -> RecordTurn:
    """Reads a turn of a live stream with `role`, `content`, `time` and perhaps `loss`.

    Raises:
      BadSampleError: The role is none of a stream, or a value is missing or malformed.
    """
    if not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
        example = '{"role": "user", "content": "...", "time": 1.0}'
        raise BadSampleError(BAD_RECORD, f"a turn is {shortened(entry)}; give {example}")
    role = entry.get("role")
    if not isinstance(role, str) or role not in _STREAM_ROLES:
        raise BadSampleError(BAD_RECORD, f"role {shortened(role)} in a stream; use one of {', '.join(_STREAM_ROLES)}")
    return RecordTurn(role, read_text(entry["content"]), _learned(entry, role), read_number(entry, "time"))


def read_text(value: Any) -> str:
    """Returns a text; raises `BadSampleError` for what no tokenizer can read."""
    if not isinstance(value, str):
        raise BadSampleError(BAD_RECORD, f"the text of a turn is {shortened(value)}; give a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        reason = f"character {error.start + 1} of a turn is half of a surrogate pair"
        raise BadSampleError(NOT_UTF8, f"{reason}; write the whole character") from None
    return value


def _learned(entry: Mapping[str, Any], role: str) -> bool:
    """Returns whether a turn is learned: those of the assistant, unless `loss` says otherwise."""
    loss = entry.get("loss")
    if loss is None:
        return role == "assistant"
    if not isinstance(loss, int | float) or loss not in (0, 1):
        raise BadSampleError(BAD_RECORD, f'"loss" is {shortened(loss)}; give true or false')
    if loss and role != "assistant":
        raise BadSampleError(BAD_RECORD, f'"loss" is true in a turn of the {role}; only answers are learned')
    return bool(loss)


def read_number(fields: Mapping[str, Any], key: str) -> float:
    """Returns a time or rate of a record; raises `BadSampleError` for what is none."""
    value = fields.get(key)
    limit = MAX_FPS if key == "fps" else MAX_SECONDS
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= limit:
        unit = f"a number up to {limit:,.0f}" if key in ("fps", "max_frames") else "seconds"
        raise BadSampleError(BAD_RECORD, f'"{key}" is {shortened(value)}; give {unit}')
    return float(value)
