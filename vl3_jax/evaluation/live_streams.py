"""Live streams: after each frame the model speaks or waits, and what it says becomes part of the prompt.

The decision is the one that training supervises after each frame (`vl3_jax.processing.loss_weights`): the next token
opens either the assistant's turn or the next frame, and the more likely of the two is taken. As in front of a camera,
the prompt has the model's own words, never the reference. The engine keeps what it has read, so each frame costs its
own tokens only.
"""

import math
from collections.abc import Sequence

import numpy as np

from vl3_jax.errors import InputError
from vl3_jax.inference.answer_settings import AnswerSettings
from vl3_jax.inference.conversations import Conversation, reply
from vl3_jax.inference.requests import Request
from vl3_jax.inference.sampling_config import SamplingConfig
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

    def append_reply(self, text: str, new_tokens: int) -> None:
        """Appends what the model says after the last frame."""
        self.words[-1] = text
        self.new_tokens += new_tokens
        self.append_turn(Turn("assistant", [text]))

    def sample(self, suffix: Sequence[int] = ()) -> Sample:
        """Returns the conversation, followed by the tokens of `suffix`."""
        return Sample(
            np.array([*self.tokens, *suffix], np.int32),
            np.array([*self.is_vision, *[False] * len(suffix)]),
            [self.visual.first_frames(len(self.words))],
        )


def watch(
    processor: Processor, processed: ProcessorOutput, request: str, settings: AnswerSettings, most_likely: int
) -> Conversation[StreamState]:
    """Runs the model over a stream, frame by frame.

    Args:
      processor: Has the tokenizer and the style of the prompt.
      processed: The stream's one video.
      request: What the user asks for.
      settings: Decoding of what is said after a frame, and the adapter that answers.
      most_likely: Number of most likely tokens among which the two that decide are looked for.

    Returns:
      The final state; `words` has an entry for each frame.

    Raises:
      InputError: The tokenizer has no tokens for streams, or there is not exactly one video.
    """
    tokenizer = processor.tokenizer
    speak, wait = (tokenizer.id_of(name) for name in (IM_START, STREAM_START))
    prompt = chat_template.generation_prompt(tokenizer)
    decision = SamplingConfig(max_new_tokens=1, logprobs=most_likely)
    state = StreamState(processor, processed, request)
    for _ in range(state.num_frames):
        state.append_frame()
        decided = yield Request(state.sample(), decision, streams=False, adapter=settings.adapter)
        likely = dict(decided.logprobs[0]) if decided.logprobs else {}
        if likely.get(speak, -math.inf) > likely.get(wait, -math.inf):
            text, generation = yield from reply(tokenizer, state.sample(prompt), settings)
            state.append_reply(text.strip(), len(generation.tokens))
    return state
