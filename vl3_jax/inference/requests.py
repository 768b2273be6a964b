"""What the engine is asked, and what it answers."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.inference.token_constraint import TokenConstraint
from vl3_jax.inference.vision_cache import Frame, frames_of, token_identities
from vl3_jax.processing.packed_batch import Sample

if TYPE_CHECKING:
    from vl3_jax.inference.engine import Engine

STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A prompt and how to continue it.

    Attributes:
      sample: The prompt, which ends with a token of text, where the answer starts.
      sampling: Decoding settings.
      is_finished: Called with each new token but a stop token; True ends the answer behind it (a stop string).
      streams: Whether somebody reads the tokens as they come. Then prompts are read in small parts between its tokens;
        otherwise all prompts are read first, in large parts, which answers many requests soonest.
      adapter: Name of the LoRA adapter that answers; None is the model without one.
      constraint: What the answer must match, for this request alone; None if it is free.
      frames: What the sample shows.
      identities: [n] int64, the identities of its tokens (`token_identities`).
    """

    sample: Sample
    sampling: SamplingConfig
    is_finished: Callable[[int], bool] | None = None
    streams: bool = True
    adapter: str | None = None
    constraint: TokenConstraint | None = None
    frames: list[Frame] = dataclasses.field(init=False)
    identities: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self):
        frames = list(frames_of(self.sample))  # hashes the media here, and not where the devices wait
        object.__setattr__(self, "frames", frames)
        object.__setattr__(self, "identities", token_identities(self.sample, frames))


@dataclasses.dataclass
class Timings:
    """Seconds of a request.

    Attributes:
      compile: Compilation of programs since it was submitted; not paid again by later requests of the same size.
      prefill: Its images and frames through the tower, and its prompt into the cache.
      decode: Calls of the decoder in which it took part.
    """

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclasses.dataclass(eq=False)
class Generation:
    """The answer to a request, as far as it is generated. Iterating over it runs the engine until it is complete.

    Attributes:
      request: The request.
      tokens: Generated ids, the stop token included.
      logprobs: (id, log-probability) of the most likely tokens at each of them; None if not requested.
      finish_reason: "stop" if a stop token, `is_finished` or the constraint ended it, "length" if `max_new_tokens` did,
        "cancelled"; None while it is not complete.
      timings: Seconds spent.
      reused_tokens: Tokens of the prompt whose keys and values were in the cache already.
      encoded_patches: Patches of the prompt that went through the tower.
      error: What ended it early, or None.
      hidden: Hidden states after the final norm of the tokens that the engine watches, [D] each, by their index in
        `tokens`.
      ending: The `finish_reason` of an answer whose last token is watched and was not read by the model yet.
    """

    request: Request
    engine: "Engine"
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[list[tuple[int, float]]] | None = None
    finish_reason: str | None = None
    timings: Timings = dataclasses.field(default_factory=Timings)
    reused_tokens: int = 0
    encoded_patches: int = 0
    error: BaseException | None = None
    arrivals: list[float] = dataclasses.field(default_factory=list)
    hidden: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    ending: str | None = None

    @property
    def done(self) -> bool:
        """Whether it is complete, was cancelled, or failed."""
        return self.finish_reason is not None or self.error is not None

    def cancel(self) -> None:
        """Ends the answer; its row is free at the next step. Nothing happens if it is complete."""
        if not self.done:
            self.finish_reason = CANCELLED

    def result(self) -> "Generation":
        """Runs the engine until the answer is complete and returns it.

        Raises:
          Exception: What ended the answer early.
        """
        for _ in self:
            pass
        return self

    def __iter__(self) -> Iterator[list[int]]:
        """Yields new tokens as they come. Leaving early cancels the rest."""
        taken = 0
        try:
            while True:
                ended = self.done
                if taken < len(self.tokens):
                    new = self.tokens[taken:]
                    taken += len(new)
                    yield new
                elif ended:
                    break
                else:
                    self.engine.step(self)
        finally:
            self.cancel()
        if self.error is not None:
            raise self.error

    def add(self, token: int, logprobs: list[tuple[int, float]] | None, end: str | None = None) -> None:
        """Appends a token (for the engine) and notices the end of the answer.

        Args:
          token: The token.
          logprobs: The most likely tokens at its position.
          end: The finish reason if the constraint of the request allows nothing more.
        """
        self.tokens.append(token)
        self.arrivals.append(time.perf_counter())
        if self.logprobs is not None and logprobs is not None:
            self.logprobs.append(logprobs)
        is_finished = self.request.is_finished
        stops = token in self.engine.stop_ids or (is_finished is not None and is_finished(token))
        is_last = len(self.tokens) >= self.request.sampling.max_new_tokens
        reason = end or (STOP if stops else LENGTH if is_last else None)
        if reason and token == self.engine.watched:
            self.ending = reason
        elif reason:
            self.finish_reason = reason

    def add_hidden(self, index: int, hidden: np.ndarray) -> None:
        """Keeps the hidden state of a watched token (for the engine), which may be what the answer's end waits for."""
        self.hidden[index] = hidden
        if self.ending and not self.done and index == len(self.tokens) - 1:
            self.finish_reason = self.ending
