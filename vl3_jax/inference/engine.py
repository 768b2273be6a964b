"""The engine: packed samples in, generated tokens out, in a few compiled programs of static shape.

A batch runs through the three programs of `programs.py`: `see` (only where there is something to see), `prefill`, and
`extend`, which decodes a few tokens at a time so that text can be streamed. Each is compiled once for each bucket of
sizes.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from vl3_jax.errors import InputError
from vl3_jax.inference import programs
from vl3_jax.inference.buckets import power_of_two, round_up_to_bucket
from vl3_jax.inference.sampling import SamplingConfig, SamplingParams
from vl3_jax.model import VideoLLaMA3
from vl3_jax.processing.packed_batch import BatchShape, Sample, pack


@dataclasses.dataclass
class Timings:
    """Seconds spent, by phase; what a later question of the same size does not pay is `compile`."""

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclasses.dataclass
class DecodeOutput:
    """What one call of the decoder added: tokens [B, n], live [B, n] (False after a row's stop token)."""

    tokens: np.ndarray
    valid: np.ndarray
    logprob_ids: np.ndarray | None = None
    logprobs: np.ndarray | None = None


class Engine:
    """A model with its parameters, ready to generate.

    Args:
      model: structure and activation type.
      params: plain nested dict, on the devices where it is to run.
      stop_ids: tokens that end an answer.
      cache_dtype: type of the key/value cache; the model's own by default.
      on_status: called with a line of text before something slow (compiling).
      mesh: where the parameters are sharded; None on one device.
    """

    def __init__(
        self,
        model: VideoLLaMA3,
        params: dict,
        stop_ids: Sequence[int],
        cache_dtype: DTypeLike | None = None,
        on_status: Callable[[str], None] = lambda line: None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.model = model
        self.params = params
        self.stop_ids = tuple(stop_ids)
        self.cache_dtype = cache_dtype or model.dtype
        self.on_status = on_status
        self.mesh = mesh
        self._programs: dict[tuple, Callable] = {}

    @property
    def compiled_programs(self) -> int:
        """How many programs have been compiled so far."""
        return len(self._programs)

    def generate(
        self, samples: Sequence[Sample], sampling: SamplingConfig, timings: Timings | None = None
    ) -> Iterator[DecodeOutput]:
        """Continues each sample; yields a few tokens at a time until every row has stopped.

        Args:
          samples: one conversation each, ending where the answer begins.
          sampling: how to decode.
          timings: filled in as time is spent.

        Raises:
          InputError: a conversation and its answer do not fit the model's context.
        """
        timings = timings if timings is not None else Timings()
        context = self.model.config.text.max_position_embeddings
        longest = max(len(sample.tokens) for sample in samples)
        if longest + sampling.max_new_tokens > context:
            raise InputError(
                f"a prompt of {longest} tokens and {sampling.max_new_tokens} new ones exceed the model's context of "
                f"{context}: ask for fewer visual tokens, frames or new tokens"
            )
        slots = round_up_to_bucket(longest + sampling.max_new_tokens)
        rows = [[sample] for sample in samples] + [[]] * (power_of_two(len(samples)) - len(samples))
        batch = pack(rows, self._shape(samples))
        sampling_params, stops = SamplingParams.of(sampling), jnp.asarray(self.stop_ids, jnp.int32)

        features = None
        if any(sample.visuals for sample in samples):
            vision = [batch[name] for name in programs.VISION_ARRAYS]
            features = self._call(timings, "prefill", programs.encode_vision, (self.model,), (self.params, *vision))
        text = [batch["tokens"], features, *(batch[name] for name in programs.TEXT_ARRAYS)]
        state, step = self._call(
            timings,
            "prefill",
            programs.prefill,
            (self.model, slots, jnp.dtype(self.cache_dtype).name, sampling.logprobs),
            (self.params, *text, jax.random.key(sampling.seed), sampling_params, stops),
        )
        made, alive = 1, len(samples)
        more = (self.model, programs.STEPS_PER_CALL, sampling.logprobs)
        if sampling.max_new_tokens > 1:  # compiled before the first word, not in the middle of the answer
            self._program(
                timings, programs.decode_steps, more, (self.params, state, sampling_params, stops, np.int32(0))
            )
        yield _fetch(step, alive)
        while made < sampling.max_new_tokens and not np.all(state.done[:alive]):
            count = min(programs.STEPS_PER_CALL, sampling.max_new_tokens - made)
            arguments = (self.params, state, sampling_params, stops, np.int32(count))
            state, step = self._call(timings, "decode", programs.decode_steps, more, arguments)
            made += count
            yield _fetch(jax.tree.map(lambda x, n=count: x[:, :n], step), alive)

    def _shape(self, samples: Sequence[Sample]) -> BatchShape:
        def largest(sizes) -> int:
            return max(sizes, default=0)

        patches = largest(sum(len(visual.patches) for visual in sample.visuals) for sample in samples)
        return BatchShape(
            length=round_up_to_bucket(largest(len(sample.tokens) for sample in samples)),
            patches=round_up_to_bucket(patches) if patches else 0,
            vision_tokens=round_up_to_bucket(largest(sample.num_vision_tokens for sample in samples)) if patches else 0,
            samples=1,
        )

    def _call(self, timings: Timings, phase: str, function: Callable, static: tuple, arguments: tuple):
        """Runs `function` to its end, its time counted to `phase`."""
        program = self._program(timings, function, static, arguments)
        started = time.perf_counter()
        result = jax.block_until_ready(program(*arguments))
        setattr(timings, phase, getattr(timings, phase) + time.perf_counter() - started)
        return result

    def _program(self, timings: Timings, function: Callable, static: tuple, arguments: tuple) -> Callable:
        """The compiled form of `function` for these shapes; compiled here where they are new."""
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments[1:]))
        signature = (function.__name__, static[1:], shapes)
        if signature not in self._programs:
            started = time.perf_counter()
            self.on_status(f"compiling {function.__name__} for this size")
            with jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext():
                self._programs[signature] = function.lower(*static, *arguments).compile()
            timings.compile += time.perf_counter() - started
        return self._programs[signature]


def _fetch(step: DecodeOutput, rows: int) -> DecodeOutput:
    return DecodeOutput(*(None if leaf is None else np.asarray(leaf)[:rows] for leaf in step))
