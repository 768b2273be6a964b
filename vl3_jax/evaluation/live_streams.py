"""Live streams: after each frame the model speaks or waits, and what it says becomes part of the prompt.

The decision is the one that training supervises after each frame (`vl3_jax.processing.loss_weights`): the next token
opens either the assistant's turn or the next frame, and the more likely of the two is taken. As in front of a camera,
the prompt has the model's own words, never the reference. The engine keeps what it has read, so each frame costs its
own tokens only.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vl3_jax.errors import InputError
from vl3_jax.evaluation.batch_generator import BatchGenerator, Reply
from vl3_jax.processing import chat_template
from vl3_jax.processing.messages import MediaPart, Turn
from vl3_jax.processing.packed_batch import Sample
from vl3_jax.processing.processor import Processor, ProcessorOutput
from vl3_jax.processing.tokenizer import IM_START, STREAM_START


class StreamState:
    """A stream and the conversation about its first frames.

    Attributes:
      visual: All frames of the stream.
      tokens: The n token ids of the conversation.
      is_vision: n bools, True at vision tokens.
      words: What the model said after each processed frame, None for nothing.
      new_tokens: Number of generated tokens.
    """

    def __init__(self, processor: Processor, processed: ProcessorOutput, request: str):
        """Begins the conversation with the user's request.

        Args:
          processor: Has the tokenizer and the style of the prompt.
          processed: The stream's one video.
          request: What the user asks for.

        Raises:
          InputError: There is not exactly one video.
        """
        if len(processed.videos) != 1 or len(processed.sample.visuals) != 1:
            raise InputError(f"a stream with {len(processed.videos)} videos; give exactly one video and no images")
        (self.visual,), times = processed.sample.visuals, processed.videos[0].timestamps
        self._times = range(self.num_frames) if times is None else times
        self._tokenizer = processor.tokenizer
        self._style = chat_template.PromptStyle(processor.config.native_placeholders)
        self.tokens: list[int] = []
        self.is_vision: list[bool] = []
        self.words: list[str | None] = []
        self.new_tokens = 0
        self.append_turn(Turn("user", [request]))

    @property
    def num_frames(self) -> int:
        """The number of frames of the whole stream."""
        return self.visual.grid[0]

    def append_turn(self, turn: Turn, visuals: Sequence[chat_template.VisualTokenCounts] = ()) -> None:
        """Appends a turn to the conversation; `visuals` has the token counts of its media."""
        (rendered,) = chat_template.render([turn], visuals, self._tokenizer, self._style)
        self.tokens += rendered.tokens.tolist()
        self.is_vision += rendered.is_vision.tolist()

    def append_frame(self) -> None:
        """Appends the turn of the next frame, without an answer."""
        frame = len(self.words)
        num_kept = int(self.visual.keep.reshape(self.num_frames, -1)[frame].sum())
        turn = Turn("stream", [MediaPart("image", None, time=self._times[frame])])
        self.append_turn(turn, [chat_template.VisualTokenCounts([num_kept])])
        self.words.append(None)

    def append_reply(self, reply: Reply) -> None:
        """Appends what the model says after the last frame."""
        self.words[-1] = reply.text
        self.new_tokens += reply.new_tokens
        self.append_turn(Turn("assistant", [reply.text]))

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
) -> list[StreamState]:
    """Runs the model over several streams in parallel, frame by frame.

    Args:
      generator: The model.
      streams: For each stream, its one video as a part of a message, and the user's request.
      max_new_tokens: Maximum number of tokens generated after a frame.

    Returns:
      The streams in their final state; `words` has an entry for each frame.

    Raises:
      InputError: The tokenizer has no tokens for streams, or a stream does not have exactly one video.
    """
    tokenizer = generator.processor.tokenizer
    choices = [tokenizer.id_of(name) for name in (IM_START, STREAM_START)]
    prompt = chat_template.generation_prompt(tokenizer)
    states = [StreamState(generator.processor, generator.process(media, None), request) for media, request in streams]
    for frame in range(max((state.num_frames for state in states), default=0)):
        active = [state for state in states if frame < state.num_frames]
        for state in active:
            state.append_frame()
        speak, wait = generator.choice_logprobs([state.sample() for state in active], choices).T
        speakers = [state for state, speaks in zip(active, speak > wait, strict=True) if speaks]
        replies = generator.generate([state.sample(prompt) for state in speakers], max_new_tokens)
        for state, reply in zip(speakers, replies, strict=True):
            state.append_reply(reply)
    return states
