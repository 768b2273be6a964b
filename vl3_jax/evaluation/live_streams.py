"""Live streams: after each frame the model speaks or waits, and what it says becomes part of the prompt.

The decision is the one that training supervises after each frame (`vl3_jax.processing.loss_weights`): the next token
opens either the assistant's turn or the next frame, and the more likely of the two is taken. As in front of a camera,
the prompt has the model's own words, never the reference. Each frame takes one prefill of the whole prompt, and one
more where the model speaks.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vl3_jax.errors import InputError
from vl3_jax.evaluation.batch_generator import BatchGenerator
from vl3_jax.processing import chat_template
from vl3_jax.processing.messages import MediaPart, Turn
from vl3_jax.processing.packed_batch import BatchShape, Sample, Visual
from vl3_jax.processing.tokenizer import IM_START, STREAM_START, Tokenizer


@dataclasses.dataclass
class StreamState:
    """A stream and the conversation about its first frames.

    Attributes:
      visual: All frames of the stream.
      times: Time of each frame in seconds.
      style: Style of the prompt.
      tokens: The n token ids of the conversation.
      is_vision: n bools, True at vision tokens.
      words: What the model said after each processed frame, None for nothing.
      new_tokens: Number of generated tokens.
    """

    visual: Visual
    times: Sequence[float]
    style: chat_template.PromptStyle
    tokens: list[int] = dataclasses.field(default_factory=list)
    is_vision: list[bool] = dataclasses.field(default_factory=list)
    words: list[str | None] = dataclasses.field(default_factory=list)
    new_tokens: int = 0

    @property
    def num_frames(self) -> int:
        """The number of frames of the whole stream."""
        return self.visual.grid[0]

    def append_turn(
        self, turn: Turn, tokenizer: Tokenizer, visuals: Sequence[chat_template.VisualTokenCounts] = ()
    ) -> None:
        """Appends a turn to the conversation; `visuals` has the token counts of its media."""
        (rendered,) = chat_template.render([turn], visuals, tokenizer, self.style)
        self.tokens += rendered.tokens.tolist()
        self.is_vision += rendered.is_vision.tolist()

    def append_frame(self, frame: int, tokenizer: Tokenizer) -> None:
        """Appends the turn of a frame, without an answer."""
        per_frame = self.visual.tokens_per_frame
        num_kept = int(self.visual.keep[frame * per_frame : (frame + 1) * per_frame].sum())
        turn = Turn("stream", [MediaPart("image", None, time=self.times[frame])])
        self.append_turn(turn, tokenizer, [chat_template.VisualTokenCounts([num_kept])])
        self.words.append(None)

    def sample(self, suffix: Sequence[int] = ()) -> Sample:
        """Returns the conversation, followed by the tokens of `suffix`."""
        return Sample(
            np.array([*self.tokens, *suffix], np.int32),
            np.array([*self.is_vision, *[False] * len(suffix)]),
            [self.visual.first_frames(len(self.words))],
        )


def run_streams(
    generator: BatchGenerator,
    streams: Sequence[tuple[Sequence[dict[str, Any]], str]],
    max_new_tokens: int,
    bucket_sizes: Sequence[BatchShape] = (),
) -> list[StreamState]:
    """Runs the model over several streams in parallel, frame by frame.

    Args:
      generator: The model.
      streams: For each stream, its one video as a part of a message, and the user's request.
      max_new_tokens: Maximum number of tokens generated after a frame.
      bucket_sizes: As for `BatchGenerator.generate`.

    Returns:
      The streams in their final state; `words` has an entry for each frame.

    Raises:
      InputError: The tokenizer has no tokens for streams, or a stream does not have exactly one video.
    """
    tokenizer = generator.processor.tokenizer
    choices = [tokenizer.id_of(name) for name in (IM_START, STREAM_START)]
    prompt = chat_template.generation_prompt(tokenizer)
    states = [_open_stream(generator, media, request) for media, request in streams]
    # Streams of similar size go into one batch, which reduces padding.
    by_size = sorted(states, key=lambda state: len(state.visual.patches))
    for frame in range(max((state.num_frames for state in states), default=0)):
        active = [state for state in by_size if frame < state.num_frames]
        for state in active:
            state.append_frame(frame, tokenizer)
        speak, wait = generator.choice_logprobs([state.sample() for state in active], choices, bucket_sizes).T
        speakers = [state for state, speaks in zip(active, speak > wait, strict=True) if speaks]
        replies = generator.generate([state.sample(prompt) for state in speakers], max_new_tokens, bucket_sizes)
        for state, reply in zip(speakers, replies, strict=True):
            state.words[-1] = reply.text
            state.new_tokens += reply.new_tokens
            state.append_turn(Turn("assistant", [reply.text]), tokenizer)
    return states


def _open_stream(generator: BatchGenerator, media: Sequence[dict[str, Any]], request: str) -> StreamState:
    processed = generator.processor([{"role": "user", "content": list(media)}], add_generation_prompt=False)
    if len(processed.videos) != 1 or len(processed.sample.visuals) != 1:
        raise InputError(f"a stream with {len(processed.videos)} videos; give exactly one video and no images")
    (visual,) = processed.sample.visuals
    times = processed.videos[0].timestamps
    style = chat_template.PromptStyle(generator.processor.config.native_placeholders)
    state = StreamState(visual, range(visual.grid[0]) if times is None else times, style)
    state.append_turn(Turn("user", [request]), generator.processor.tokenizer)
    return state
