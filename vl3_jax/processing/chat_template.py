"""Conversations to token ids: the strings that the released weights were trained on.

Each message is tokenised on its own; the joins are special tokens, so the ids equal those of the whole
text. Structure is placed by id and text is encoded as plain text, so nothing that a user types can become
a placeholder or end a turn.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from vl3_jax.processing.messages import MediaPart, Turn
from vl3_jax.processing.tokenizer import IM_END, IM_START, STREAM_END, STREAM_START, Tokenizer

DEFAULT_SYSTEM_PROMPT = (
    "You are VideoLLaMA3 created by Alibaba DAMO Academy, "
    "a helpful assistant to help people understand images and videos."
)


@dataclasses.dataclass(frozen=True)
class VisualTokenCounts:
    """What the text must know of a picture or video: vision tokens left of each frame, and the frames' times."""

    frame_tokens: Sequence[int]
    times: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """Where templates differ.

    Attributes:
      native_placeholders: `<|image_pad|>` and `<|video_pad|>` instead of `<image>`.
      trainer_streams: stream messages as the official trainer writes them (a newline after their end, no
        times) instead of as the released processor does.
    """

    native_placeholders: bool = False
    trainer_streams: bool = False


@dataclasses.dataclass(frozen=True)
class RenderedTurn:
    """Token ids of one message, [n] int32, and which of them are placeholders of vision tokens, [n] bool."""

    role: str
    tokens: np.ndarray
    is_vision: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Placeholders:
    kind: str
    count: int


def with_default_system(turns: Sequence[Turn]) -> list[Turn]:
    """Puts the official system prompt first, unless the conversation begins with one of its own."""
    own = bool(turns) and turns[0].role == "system"
    return list(turns) if own else [Turn("system", [DEFAULT_SYSTEM_PROMPT]), *turns]


def render(
    turns: Sequence[Turn], shown: Sequence[VisualTokenCounts], tokenizer: Tokenizer, style: PromptStyle | None = None
) -> list[RenderedTurn]:
    """Token ids of each message.

    Args:
      turns: the conversation.
      shown: of each picture and video, in order of appearance.
      tokenizer: where all ids come from.
      style: see there; the released template if not given.

    Raises:
      InputError: the tokenizer lacks a special token that this conversation needs.
    """
    style = style or PromptStyle()
    left = iter(shown)
    return [_render_turn(turn, left, tokenizer, style) for turn in turns]


def generation_prompt(tokenizer: Tokenizer) -> list[int]:
    """Ids that open the assistant's turn."""
    return [tokenizer.id_of(IM_START), *tokenizer.encode("assistant\n")]


def time_label(seconds: float) -> str:
    """As written before a frame; rounded to a tenth, and always with its decimal."""
    return f"Time {round(float(seconds), 1)}s:"


def _render_turn(
    turn: Turn, shown: Iterator[VisualTokenCounts], tokenizer: Tokenizer, style: PromptStyle
) -> RenderedTurn:
    is_stream = turn.role == "stream"
    opening, closing = (STREAM_START, STREAM_END) if is_stream else (IM_START, IM_END)
    ends_with_newline = not is_stream or style.trainer_streams
    pieces: list[str | int | _Placeholders] = [tokenizer.id_of(opening), f"{turn.role}\n"]
    for part in turn.parts:
        if isinstance(part, str):
            pieces.append(part)
        else:
            pieces += _media_pieces(part, next(shown), with_times=not (is_stream and style.trainer_streams))
    pieces += [tokenizer.id_of(closing), "\n" if ends_with_newline else ""]
    return RenderedTurn(turn.role, *_encode(pieces, tokenizer, style))


def _media_pieces(media: MediaPart, shown: VisualTokenCounts, with_times: bool) -> list[str | _Placeholders]:
    if media.kind == "image":
        label = f"{time_label(media.time)} " if media.time is not None and with_times else ""
        return [label, _Placeholders("image", shown.frame_tokens[0]), "\n"]
    pieces: list[str | _Placeholders] = []
    for number, tokens in enumerate(shown.frame_tokens):
        label = "" if shown.times is None else time_label(shown.times[number])
        pieces += ["," + label if number else label, _Placeholders("video", tokens)]
    return [*pieces, "\n"]


def _encode(
    pieces: Sequence[str | int | _Placeholders], tokenizer: Tokenizer, style: PromptStyle
) -> tuple[np.ndarray, np.ndarray]:
    """Adjacent texts are encoded as one: tokens do not end where parts do."""
    ids: list[int] = []
    is_vision: list[bool] = []
    text = ""

    def add(new: list[int], vision: bool = False) -> None:
        ids.extend(new)
        is_vision.extend([vision] * len(new))

    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        add(tokenizer.encode(text) if text else [])
        text = ""
        if isinstance(piece, _Placeholders):
            add([tokenizer.placeholder(piece.kind, style.native_placeholders)] * piece.count, vision=True)
        else:
            add([piece])
    add(tokenizer.encode(text) if text else [])
    return np.array(ids, np.int32), np.array(is_vision, bool)
