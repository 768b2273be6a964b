"""The engine: packed samples in, generated tokens out, in a few compiled programs of static shape.

A batch runs through three programs: `encode` (only where there is something to see), `prefill`, and `extend`, which
decodes a few tokens at a time so that text can be streamed. Each is compiled once for each bucket of sizes.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from vl3_jax.errors import InputError
from vl3_jax.inference.buckets import bucket, power_of_two
from vl3_jax.inference.sampling import Knobs, Sampling, choose
from vl3_jax.model import KVCache, VideoLLaMA3, decode, encode, unembed
from vl3_jax.parallel.rules import constrain
from vl3_jax.processing.packed_batch import BatchShape, Sample, pack

STEPS_PER_CALL = 8
VISION_ARRAYS = ("patches", "patch_segment", "patch_hw", "token_patches")
TEXT_ARRAYS = ("vision_slot", "segment_ids", "positions")


@flax.struct.dataclass
class DecodeState:
    """Everything that decoding carries from one token to the next; B rows.

    Attributes:
      cache: keys and values of all tokens but the newest.
      token, position: [B] int32, the newest token, not yet in the cache, and where it stands.
      done: [B] bool, rows that have stopped.
      generated: [B, V] bool, tokens generated so far.
      key: random key.
    """

    cache: KVCache
    token: jax.Array
    position: jax.Array
    done: jax.Array
    generated: jax.Array
    key: jax.Array

    def placed(self) -> "DecodeState":
        """Keeps every array where the rules want it, so that each call takes what the one before gave."""
        cache = self.cache
        heads, slots = (None, "batch", None, "kv_heads", None), ("batch", None)
        return self.replace(
            cache=cache.replace(
                keys=constrain(cache.keys, *heads),
                values=constrain(cache.values, *heads),
                segment_ids=constrain(cache.segment_ids, *slots),
                positions=constrain(cache.positions, *slots),
                length=constrain(cache.length, "batch"),
            ),
            token=constrain(self.token, "batch"),
            position=constrain(self.position, "batch"),
            done=constrain(self.done, "batch"),
            generated=constrain(self.generated, "batch", None),
        )


@dataclasses.dataclass
class Timings:
    """Seconds spent, by phase; what a later question of the same size does not pay is `compile`."""

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclasses.dataclass
class Step:
    """What one call of the decoder added: tokens [B, n], live [B, n] (False after a row's stop token)."""

    tokens: np.ndarray
    live: np.ndarray
    logprob_ids: np.ndarray | None = None
    logprobs: np.ndarray | None = None


class Engine:
    """A model with its parameters, ready to generate.

    Args:
      model: structure and activation type.
      params: plain nested dict, on the devices where it is to run.
      stop_ids: tokens that end an answer.
      cache_dtype: type of the key/value cache; the model's own by default.
      notify: called with a line of text before something slow (compiling).
      mesh: where the parameters are sharded; None on one device.
    """

    def __init__(
        self,
        model: VideoLLaMA3,
        params: dict,
        stop_ids: Sequence[int],
        cache_dtype: DTypeLike | None = None,
        notify: Callable[[str], None] = lambda line: None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.model = model
        self.params = params
        self.stop_ids = tuple(stop_ids)
        self.cache_dtype = cache_dtype or model.dtype
        self.notify = notify
        self.mesh = mesh
        self._programs: dict[tuple, Callable] = {}

    @property
    def compiled_programs(self) -> int:
        """How many programs have been compiled so far."""
        return len(self._programs)

    def generate(self, samples: Sequence[Sample], sampling: Sampling, timings: Timings | None = None) -> Iterator[Step]:
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
        slots = bucket(longest + sampling.max_new_tokens)
        rows = [[sample] for sample in samples] + [[]] * (power_of_two(len(samples)) - len(samples))
        batch = pack(rows, self._shape(samples))
        knobs, stops = Knobs.of(sampling), jnp.asarray(self.stop_ids, jnp.int32)

        features = None
        if any(sample.visuals for sample in samples):
            vision = [batch[name] for name in VISION_ARRAYS]
            features = self._call(timings, "prefill", _encode, (self.model,), (self.params, *vision))
        text = [batch["tokens"], features, *(batch[name] for name in TEXT_ARRAYS)]
        state, step = self._call(
            timings,
            "prefill",
            _prefill,
            (self.model, slots, jnp.dtype(self.cache_dtype).name, sampling.logprobs),
            (self.params, *text, jax.random.key(sampling.seed), knobs, stops),
        )
        made, alive = 1, len(samples)
        more = (self.model, STEPS_PER_CALL, sampling.logprobs)
        if sampling.max_new_tokens > 1:  # compiled before the first word, not in the middle of the answer
            self._program(timings, _extend, more, (self.params, state, knobs, stops, np.int32(0)))
        yield _fetch(step, alive)
        while made < sampling.max_new_tokens and not np.all(state.done[:alive]):
            count = min(STEPS_PER_CALL, sampling.max_new_tokens - made)
            arguments = (self.params, state, knobs, stops, np.int32(count))
            state, step = self._call(timings, "decode", _extend, more, arguments)
            made += count
            yield _fetch(jax.tree.map(lambda x, n=count: x[:, :n], step), alive)

    def _shape(self, samples: Sequence[Sample]) -> BatchShape:
        def largest(sizes) -> int:
            return max(sizes, default=0)

        patches = largest(sum(len(visual.patches) for visual in sample.visuals) for sample in samples)
        return BatchShape(
            length=bucket(largest(len(sample.tokens) for sample in samples)),
            patches=bucket(patches) if patches else 0,
            vision_tokens=bucket(largest(sample.num_vision_tokens for sample in samples)) if patches else 0,
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
            self.notify(f"compiling {function.__name__.strip('_')} for this size")
            with jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext():
                self._programs[signature] = function.lower(*static, *arguments).compile()
            timings.compile += time.perf_counter() - started
        return self._programs[signature]


def _fetch(step: Step, rows: int) -> Step:
    return Step(*(None if leaf is None else np.asarray(leaf)[:rows] for leaf in step))


_encode = functools.partial(jax.jit, static_argnums=0)(encode)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _prefill(
    model,
    slots,
    cache_dtype,
    logprobs,
    params,
    tokens,
    features,
    vision_slot,
    segment_ids,
    positions,
    key,
    knobs,
    stops,
):
    """Writes the prompts into a new cache and chooses each row's first token."""
    cache = KVCache.empty(model.config.text, tokens.shape[0], slots, cache_dtype)
    hidden, cache = decode(model, params, tokens, features, vision_slot, segment_ids, positions, cache)
    last = jnp.maximum(cache.length - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    rows, vocab = tokens.shape[0], model.config.text.vocab_size
    state = DecodeState(
        cache=cache,
        token=jnp.zeros(rows, jnp.int32),
        position=last,
        done=cache.length == 0,
        generated=jnp.zeros((rows, vocab), bool),
        key=key,
    )
    state, column = _next_token(model, params, hidden, state, knobs, stops, logprobs)
    return state.placed(), tuple(None if leaf is None else leaf[:, None] for leaf in column)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,))
def _extend(model, steps, logprobs, params, state, knobs, stops, count):
    """Decodes `count` <= `steps` tokens, or fewer once every row has stopped."""
    rows = state.token.shape[0]
    shapes = [(jnp.int32, ()), (jnp.bool_, ())]
    shapes += [(jnp.int32, (logprobs,)), (jnp.float32, (logprobs,))] if logprobs else []
    columns = tuple(jnp.zeros((rows, steps, *shape), dtype) for dtype, shape in shapes)

    def unfinished(carry):
        index, state, _ = carry
        return (index < count) & ~jnp.all(state.done)

    def one_step(carry):
        index, state, columns = carry
        live = (~state.done).astype(jnp.int32)[:, None]
        nothing = jnp.full_like(live, -1)
        arguments = (state.token[:, None], None, nothing, live, state.position[:, None], state.cache)
        hidden, cache = decode(model, params, *arguments)
        state, column = _next_token(model, params, hidden, state.replace(cache=cache), knobs, stops, logprobs)
        new = [leaf for leaf in column if leaf is not None]
        return index + 1, state, tuple(all_.at[:, index].set(one) for all_, one in zip(columns, new, strict=True))

    _, state, columns = jax.lax.while_loop(unfinished, one_step, (jnp.int32(0), state, columns))
    return state.placed(), (*columns, *(None,) * (4 - len(columns)))


def _next_token(model, params, hidden, state, knobs, stops, logprobs):
    """Chooses a token from the newest hidden state [B, 1, D]; gives the columns of a `Step`."""
    logits = unembed(model, params, hidden[:, 0])
    key, here = jax.random.split(state.key)
    token = choose(logits, state.generated, here, knobs)
    live = ~state.done
    column = (token, live, None, None)
    if logprobs:
        values, ids = jax.lax.top_k(jax.nn.log_softmax(logits), logprobs)
        column = (token, live, ids.astype(jnp.int32), values)
    state = state.replace(
        token=token,
        position=state.position + 1,
        done=state.done | jnp.isin(token, stops),
        generated=state.generated.at[jnp.arange(token.shape[0]), token].set(True),
        key=key,
    )
    return state, column
