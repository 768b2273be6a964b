"""The engine: packed samples in, generated tokens out, in a few compiled programs of static shape.

A batch runs through the three programs of `programs.py`: `encode_vision` (only if there are images or videos),
`prefill`, and `decode_steps`, which decodes a few tokens at a time so that text can be streamed. Each program is
compiled once for each bucket of sizes.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vl3_jax.errors import InputError
from vl3_jax.inference import programs
from vl3_jax.inference.buckets import power_of_two, round_up_to_bucket
from vl3_jax.inference.sampling import SamplingParams
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.model import VideoLLaMA3
from vl3_jax.processing.packed_batch import BatchShape, Sample, pack


@dataclasses.dataclass
class Timings:
    """Seconds spent in each phase; `compile` is not paid again by later batches of the same size."""

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclasses.dataclass
class DecodeOutput:
    """The tokens that one call of the decoder generated, for B rows and n steps.

    Attributes:
      tokens: [B, n] int32, token ids.
      valid: [B, n] bool, False after a row's stop token.
      logprob_ids: [B, n, K] int32, ids of the K most likely tokens; None if no log-probabilities were requested.
      logprobs: [B, n, K] float32, their log-probabilities; None likewise.
    """

    tokens: np.ndarray
    valid: np.ndarray
    logprob_ids: np.ndarray | None = None
    logprobs: np.ndarray | None = None


class Engine:
    """A model with its parameters, ready to generate.

    Args:
      model: The model's structure and activation type.
      params: Parameters as plain nested dicts, on the devices where they are used.
      stop_ids: Tokens that end an answer.
      on_status: Called with a line of text before something slow (compilation).
      mesh: The mesh over which the parameters are sharded; None on one device.
    """

    def __init__(
        self,
        model: VideoLLaMA3,
        params: dict,
        stop_ids: Sequence[int],
        on_status: Callable[[str], None] = lambda line: None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.model = model
        self.params = params
        self.stop_ids = tuple(stop_ids)
        self.on_status = on_status
        self.mesh = mesh
        self._programs: dict[tuple, Callable] = {}

    @property
    def compiled_programs(self) -> int:
        """Number of programs that have been compiled."""
        return len(self._programs)

    def generate(
        self,
        samples: Sequence[Sample],
        sampling: SamplingConfig,
        timings: Timings | None = None,
        shape: BatchShape | None = None,
    ) -> Iterator[DecodeOutput]:
        """Generates the continuation of each sample, a few tokens at a time, until every row has stopped.

        Args:
          samples: One prompt each, ending where the answer starts.
          sampling: Decoding settings.
          timings: Updated in place with the seconds spent.
          shape: Size of a row, which holds each of the samples; by default the smallest bucket that does.

        Yields:
          The tokens of each call of the decoder, one row for each sample.

        Raises:
          InputError: A prompt and its answer exceed the model's context.
        """
        timings = timings if timings is not None else Timings()
        context = self.model.config.text.max_position_embeddings
        longest = shape.length if shape else max(len(sample.tokens) for sample in samples)
        if longest + sampling.max_new_tokens > context:
            raise InputError(
                f"a prompt of {longest} tokens and {sampling.max_new_tokens} new ones exceed the model's context of "
                f"{context}: lower --max-visual-tokens, --max-frames or --max-new-tokens, or shorten the text"
            )
        slots = round_up_to_bucket(longest + sampling.max_new_tokens)
        rows = [[sample] for sample in samples] + [[]] * (power_of_two(len(samples)) - len(samples))
        batch = pack(rows, shape or self._batch_shape(samples))
        sampling_params, stop_ids = SamplingParams.of(sampling), jnp.asarray(self.stop_ids, jnp.int32)

        features = None
        if any(sample.visuals for sample in samples):
            vision = [batch[name] for name in programs.VISION_ARRAYS]
            features = self._run(timings, "prefill", programs.encode_vision, (self.model,), (self.params, *vision))
        text = (batch["tokens"], features, *(batch[name] for name in programs.TEXT_ARRAYS))
        static = (self.model, slots, sampling.logprobs)
        arguments = (self.params, text, jax.random.key(sampling.seed), sampling_params, stop_ids)
        state, output = self._run(timings, "prefill", programs.prefill, static, arguments)
        num_generated, num_rows = 1, len(samples)
        static = (self.model, programs.STEPS_PER_CALL, sampling.logprobs)
        if sampling.max_new_tokens > 1:  # compiled before the first token is yielded, not in the middle of the answer
            arguments = (self.params, state, sampling_params, stop_ids, np.int32(0))
            self._compiled(timings, programs.decode_steps, static, arguments)
        yield _fetch(output, num_rows, 1)
        while num_generated < sampling.max_new_tokens and not np.all(state.done[:num_rows]):
            num_steps = min(programs.STEPS_PER_CALL, sampling.max_new_tokens - num_generated)
            arguments = (self.params, state, sampling_params, stop_ids, np.int32(num_steps))
            state, output = self._run(timings, "decode", programs.decode_steps, static, arguments)
            num_generated += num_steps
            yield _fetch(output, num_rows, num_steps)

    def _batch_shape(self, samples: Sequence[Sample]) -> BatchShape:
        def largest(sizes) -> int:
            return max(sizes, default=0)

        patches = largest(sum(len(visual.patches) for visual in sample.visuals) for sample in samples)
        return BatchShape(
            length=round_up_to_bucket(largest(len(sample.tokens) for sample in samples)),
            patches=round_up_to_bucket(patches) if patches else 0,
            vision_tokens=round_up_to_bucket(largest(sample.num_vision_tokens for sample in samples)) if patches else 0,
            samples=1,
        )

    def _run(self, timings: Timings, phase: str, function: Callable, static: tuple, arguments: tuple):
        """Runs `function`, waits for its results and adds the seconds to `phase` of `timings`."""
        program = self._compiled(timings, function, static, arguments)
        start = time.perf_counter()
        result = jax.block_until_ready(program(*arguments))
        setattr(timings, phase, getattr(timings, phase) + time.perf_counter() - start)
        return result

    def _compiled(self, timings: Timings, function: Callable, static: tuple, arguments: tuple) -> Callable:
        """Returns the compiled form of `function` for these shapes, and compiles it if they are new."""
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments[1:]))
        signature = (function.__name__, static[1:], shapes)
        if signature not in self._programs:
            start = time.perf_counter()
            self.on_status(f"compiling {function.__name__} for this size")
            with jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext():
                self._programs[signature] = function.lower(*static, *arguments).compile()
            timings.compile += time.perf_counter() - start
        return self._programs[signature]


def _fetch(output: tuple[jax.Array | None, ...], num_rows: int, num_steps: int) -> DecodeOutput:
    """Copies the first rows and steps of a program's outputs to the host."""
    return DecodeOutput(*jax.tree.map(lambda leaf: np.asarray(leaf)[:num_rows, :num_steps], output))
