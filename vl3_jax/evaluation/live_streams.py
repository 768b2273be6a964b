"""Live streams: after each frame the model speaks or keeps watching, and what it says is part of what comes after.

Whether it speaks is what training supervises after each frame (`vl3_jax.processing.loss_weights`): the next token opens
either the assistant's turn or the next frame, and the likelier of the two decides. The model hears its own words only,
never the true ones, as it would in front of a camera. One prefill of the stream so far for each frame, and one more
with its answer where it speaks.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.stream_layout import truncate_frames
from vl3_jax.errors import InputError
from vl3_jax.evaluation.batch_generator import BatchGenerator
from vl3_jax.processing import chat_template
from vl3_jax.processing.messages import MediaPart, Turn
from vl3_jax.processing.packed_batch import BatchShape, Sample, Visual
from vl3_jax.processing.tokenizer import IM_START, STREAM_START, Tokenizer


@dataclasses.dataclass
class StreamState:
    """A stream as far as it has been shown.

    Attributes:
      visual: all its frames.
      times: seconds of each.
      style: of the template.
      tokens, is_vision: [n] lists, the conversation so far.
      words: what was said after each frame shown, None for nothing.
      new_tokens: that the words had.
    """

    visual: Visual
    times: Sequence[float]
    style: chat_template.PromptStyle
    tokens: list[int] = dataclasses.field(default_factory=list)
    is_vision: list[bool] = dataclasses.field(default_factory=list)
    words: list[str | None] = dataclasses.field(default_factory=list)
    new_tokens: int = 0

    @property
    def frames(self) -> int:
        """How many the stream has."""
        return self.visual.grid[0]

    def add(self, turn: Turn, tokenizer: Tokenizer, shown: Sequence[chat_template.VisualTokenCounts] = ()) -> None:
        """Writes one more turn."""
        (rendered,) = chat_template.render([turn], shown, tokenizer, self.style)
        self.tokens += rendered.tokens.tolist()
        self.is_vision += rendered.is_vision.tolist()

    def show(self, frame: int, tokenizer: Tokenizer) -> None:
        """Writes the turn of a frame; nothing is said to it yet."""
        here = slice(frame * self.visual.tokens_per_frame, (frame + 1) * self.visual.tokens_per_frame)
        shown = chat_template.VisualTokenCounts([int(self.visual.keep[here].sum())])
        self.add(Turn("stream", [MediaPart("image", None, time=self.times[frame])]), tokenizer, [shown])
        self.words.append(None)

    def sample(self, opening: Sequence[int] = ()) -> Sample:
        """The conversation so far, followed by `opening`."""
        return Sample(
            np.array([*self.tokens, *opening], np.int32),
            np.array([*self.is_vision, *[False] * len(opening)]),
            [truncate_frames(self.visual, len(self.words))],
        )


def run_streams(
    answerer: BatchGenerator,
    streams: Sequence[tuple[Sequence[dict[str, Any]], str]],
    max_new_tokens: int,
    bucket_sizes: Sequence[BatchShape] = (),
) -> list[StreamState]:
    """Watches streams side by side, from their first frames to their last.

    Args:
      answerer: of the model.
      streams: of each, its one video as part of a message, and what the user asks for beforehand.
      max_new_tokens: of what is said at a time.
      rooms: as of `BatchGenerator.answer`.

    Returns:
      The streams, watched to their ends; `words` has an entry for each frame.

    Raises:
      InputError: the tokenizer knows no streams; not exactly one video.
    """
    tokenizer = answerer.processor.tokenizer
    choices = [tokenizer.id_of(name) for name in (IM_START, STREAM_START)]
    opening = chat_template.generation_prompt(tokenizer)
    watched = [_opened(answerer, media, request) for media, request in streams]
    # Streams of similar size stand side by side, so that their batches are padded little.
    ordered = sorted(watched, key=lambda one: len(one.visual.patches))
    for frame in range(max((one.frames for one in watched), default=0)):
        valid = [one for one in ordered if frame < one.frames]
        for one in valid:
            one.show(frame, tokenizer)
        speak, wait = answerer.decide([one.sample() for one in valid], choices, bucket_sizes).T
        speakers = [one for one, now in zip(valid, speak > wait, strict=True) if now]
        replies = answerer.answer([one.sample(opening) for one in speakers], max_new_tokens, bucket_sizes)
        for one, reply in zip(speakers, replies, strict=True):
            one.words[-1] = reply.text
            one.new_tokens += reply.new_tokens
            one.add(Turn("assistant", [reply.text]), tokenizer)
    return watched


def _opened(answerer: BatchGenerator, media: Sequence[dict[str, Any]], request: str) -> StreamState:
    processed = answerer.processor([{"role": "user", "content": list(media)}], add_generation_prompt=False)
    if len(processed.videos) != 1 or len(processed.sample.visuals) != 1:
        raise InputError(f"a stream of {len(processed.videos)} videos; it has exactly one and no pictures")
    (visual,) = processed.sample.visuals
    times = processed.videos[0].timestamps
    style = chat_template.PromptStyle(answerer.processor.config.native_placeholders)
    stream = StreamState(visual, range(visual.grid[0]) if times is None else times, style)
    stream.add(Turn("user", [request]), answerer.processor.tokenizer)
    return stream
