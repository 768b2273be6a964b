"""Renders conversations to token ids with the chat template that the released weights were trained on.

Each message is tokenised on its own. Messages are joined by special tokens, so the ids equal those of the whole
text. Special tokens are inserted by id and text is encoded as plain text, so nothing that a user types can become
a placeholder or end a turn.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from vl3_jax.processing.messages import MediaPart, Region, Turn
from vl3_jax.processing.tokenizer import (
    IM_END,
    IM_START,
    REGION_END,
    REGION_START,
    STREAM_END,
    STREAM_START,
    Tokenizer,
)

_Piece = str | tuple[list[int], bool]  # text, or token ids and whether they are placeholders of vision tokens

DEFAULT_SYSTEM_PROMPT = (
    "You are VideoLLaMA3 created by Alibaba DAMO Academy, "
    "a helpful assistant to help people understand images and videos."
)


@dataclasses.dataclass(frozen=True)
class VisualTokenCounts:
    """Sizes and times of one image or video, as the chat template needs them.

    Attributes:
      frame_tokens: Number of vision tokens of each frame after pruning; one entry for an image.
      times: Time of each frame in seconds, written before the frame. None writes no times.
    """

    frame_tokens: Sequence[int]
    times: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """Variants of the chat template.

    Attributes:
      native_placeholders: Use `<|image_pad|>` and `<|video_pad|>` instead of `<image>`.
      trainer_streams: Write stream messages as the official trainer does (with a newline after their end and without
        times) instead of as the released processor does.
    """

    native_placeholders: bool = False
    trainer_streams: bool = False


@dataclasses.dataclass(frozen=True)
class RenderedTurn:
    """One message as token ids.

    Attributes:
      role: Role of the message.
      tokens: [n] int32 token ids.
      is_vision: [n] bool; True for the placeholders of vision tokens.
      learned: Whether training learns the message, if it is one of the assistant.
    """

    role: str
    tokens: np.ndarray
    is_vision: np.ndarray
    learned: bool = True


def with_default_system(turns: Sequence[Turn]) -> list[Turn]:
    """Prepends the official system prompt, unless the conversation starts with a system message."""
    has_system = bool(turns) and turns[0].role == "system"
    return list(turns) if has_system else [Turn("system", [DEFAULT_SYSTEM_PROMPT]), *turns]


def render(
    turns: Sequence[Turn],
    token_counts: Sequence[VisualTokenCounts],
    tokenizer: Tokenizer,
    style: PromptStyle | None = None,
    region_tokens: Sequence[int] = (),
) -> list[RenderedTurn]:
    """Converts each message to token ids.

    Args:
      turns: Messages of the conversation.
      token_counts: One entry for each image and video, in order of appearance.
      tokenizer: Tokenizer of the checkpoint.
      style: Variant of the template; defaults to that of the released processor.
      region_tokens: Number of vision tokens of each region, in order of appearance.

    Returns:
      One rendered turn for each message.

    Raises:
      InputError: The tokenizer lacks a special token that this conversation needs.
    """
    style = style or PromptStyle()
    remaining, regions = iter(token_counts), iter(region_tokens)
    return [_render_turn(turn, remaining, regions, tokenizer, style) for turn in turns]


def generation_prompt(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids that open an assistant turn."""
    return [tokenizer.id_of(IM_START), *tokenizer.encode("assistant\n")]


def time_label(seconds: float) -> str:
    """Returns the text written before a frame: its time rounded to a tenth of a second, always with one decimal."""
    return f"Time {round(float(seconds), 1)}s:"


def _render_turn(
    turn: Turn,
    token_counts: Iterator[VisualTokenCounts],
    region_tokens: Iterator[int],
    tokenizer: Tokenizer,
    style: PromptStyle,
) -> RenderedTurn:
    is_stream = turn.role == "stream"
    opening, closing = (STREAM_START, STREAM_END) if is_stream else (IM_START, IM_END)
    ends_with_newline = not is_stream or style.trainer_streams
    pieces: list[_Piece] = [([tokenizer.id_of(opening)], False), f"{turn.role}\n"]
    for part in turn.parts:
        if isinstance(part, str):
            pieces.append(part)
        elif isinstance(part, Region):
            placeholders = [tokenizer.placeholder("image", style.native_placeholders)] * next(region_tokens)
            opening_tag, closing_tag = ([tokenizer.id_of(name)] for name in (REGION_START, REGION_END))
            pieces += [(opening_tag, False), (placeholders, True), (closing_tag, False)]
        else:
            placeholder = tokenizer.placeholder(part.kind, style.native_placeholders)
            with_times = not (is_stream and style.trainer_streams)
            pieces += _media_pieces(part, next(token_counts), placeholder, with_times)
    pieces += [([tokenizer.id_of(closing)], False), "\n" if ends_with_newline else ""]
    return RenderedTurn(turn.role, *_encode(pieces, tokenizer), turn.learned)


def _media_pieces(media: MediaPart, counts: VisualTokenCounts, placeholder: int, with_times: bool) -> list[_Piece]:
    if media.kind == "image":
        label = f"{time_label(media.time)} " if media.time is not None and with_times else ""
        return [label, ([placeholder] * counts.frame_tokens[0], True), "" if media.inline else "\n"]
    pieces: list[_Piece] = []
    texts = collections.defaultdict(str)
    for frame, text in media.inserts:
        texts[min(frame, len(counts.frame_tokens))] += text
    for frame, num_tokens in enumerate(counts.frame_tokens):
        label = "" if counts.times is None else time_label(counts.times[frame])
        separator = "" if not frame else "\n" if frame in texts else ","
        pieces += [separator + texts.get(frame, "") + label, ([placeholder] * num_tokens, True)]
    return [*pieces, "\n" + texts[len(counts.frame_tokens)]]


def _encode(pieces: Sequence[_Piece], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Encodes pieces to token ids and the mask of vision placeholders.

    Adjacent texts are encoded as one text, because a token may span several parts.
    """
    spans = []
    for is_text, group in itertools.groupby(pieces, key=lambda piece: isinstance(piece, str)):
        if is_text:
            spans.append((tokenizer.encode("".join(map(str, group))), False))
        else:
            spans += group
    ids = [token_id for span_ids, _ in spans for token_id in span_ids]
    is_vision = np.repeat([vision for _, vision in spans], [len(span_ids) for span_ids, _ in spans])
    return np.array(ids, np.int32), is_vision
