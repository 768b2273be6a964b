"""The jitted programs of the engine: vision encoding, prefill of the KV cache, and decoding of a few tokens."""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from vl3_jax.inference.sampling import sample_token
from vl3_jax.model import KVCache, decode, encode, unembed
from vl3_jax.parallel.rules import constrain

STEPS_PER_CALL = 8
VISION_ARRAYS = ("patches", "patch_segment", "patch_hw", "token_patches")
TEXT_ARRAYS = ("vision_slot", "segment_ids", "positions")


@flax.struct.dataclass
class DecodeState:
    """The state that decoding carries from one token to the next, for B rows.

    Attributes:
      cache: Keys and values of all tokens but the newest.
      token: [B] int32, the newest token, which is not yet in the cache.
      position: [B] int32, the position of that token.
      done: [B] bool, the rows that have stopped.
      generated: [B, V] bool, the tokens that each row has generated.
      key: Random key.
    """

    cache: KVCache
    token: jax.Array
    position: jax.Array
    done: jax.Array
    generated: jax.Array
    key: jax.Array

    def axes(self) -> "DecodeState":
        """Returns the logical axes of the arrays, in the place of each."""
        rows, tokens = _axes("batch"), _axes("batch", None)
        return DecodeState(self.cache.axes(), token=rows, position=rows, done=rows, generated=tokens, key=_axes())

    def constrained(self) -> "DecodeState":
        """Constrains every array to its axes, so that each call accepts what the previous call returned."""
        return jax.tree.map(lambda leaf, axes: constrain(leaf, *axes), self, self.axes())


def _axes(*names: str | None) -> Any:
    """Returns the logical axes of an array, to stand in the array's place in a state."""
    return names


# `keep_unused`: the compiler's memory analysis then counts all weights as arguments of every program.
encode_vision = functools.partial(jax.jit, static_argnums=0, keep_unused=True)(encode)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), keep_unused=True)
def prefill(model, slots, logprobs, params, text, key, sampling_params, stop_ids):
    """Writes the prompts into a new cache of `slots` slots and chooses each row's first token.

    Args:
      model: The model, in whose type the cache is.
      slots: Slots of the cache.
      logprobs: Number of top log-probabilities of each token.
      params: Parameters.
      text: The tokens [B, L], the vision features or None, and `TEXT_ARRAYS`, as `decode` takes them.
      key: Random key.
      sampling_params: `SamplingParams`.
      stop_ids: [n] int32, the tokens that end an answer.

    Returns:
      A `DecodeState`, and the fields of a `DecodeOutput` with n = 1.
    """
    rows, vocab_size = text[0].shape[0], model.config.text.vocab_size
    cache = KVCache.empty(model.config.text, rows, slots, model.dtype, model.serving)
    hidden, cache = decode(model, params, *text, cache=cache)
    assert cache is not None  # while tracing: `decode` returns a cache if it was given one
    last = jnp.maximum(cache.length - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    state = DecodeState(
        cache=cache,
        token=jnp.zeros(rows, jnp.int32),
        position=last,
        done=cache.length == 0,
        generated=jnp.zeros((rows, vocab_size), bool),
        key=key,
    )
    state, outputs = _next_token(model, params, hidden, state, sampling_params, stop_ids, logprobs)
    return state.constrained(), jax.tree.map(lambda leaf: leaf[:, None], outputs)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,), keep_unused=True)
def decode_steps(model, max_steps, logprobs, params, state, sampling_params, stop_ids, num_steps):
    """Decodes `num_steps` <= `max_steps` tokens, or fewer once every row has stopped.

    Returns:
      The new `DecodeState`, and the fields of a `DecodeOutput` with n = `max_steps`; only the first `num_steps` columns
      are filled.
    """
    shape = (state.token.shape[0], max_steps)
    top = (jnp.zeros((*shape, logprobs), jnp.int32), jnp.zeros((*shape, logprobs))) if logprobs else (None, None)
    buffers = (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), *top)

    def unfinished(carry):
        index, state, _ = carry
        return (index < num_steps) & ~jnp.all(state.done)

    def one_step(carry):
        index, state, buffers = carry
        segment_ids = (~state.done).astype(jnp.int32)[:, None]
        no_vision = jnp.full_like(segment_ids, -1)
        arguments = (state.token[:, None], None, no_vision, segment_ids, state.position[:, None], state.cache)
        hidden, cache = decode(model, params, *arguments)
        state = state.replace(cache=cache)
        state, outputs = _next_token(model, params, hidden, state, sampling_params, stop_ids, logprobs)
        return index + 1, state, jax.tree.map(lambda buffer, new: buffer.at[:, index].set(new), buffers, outputs)

    _, state, buffers = jax.lax.while_loop(unfinished, one_step, (jnp.int32(0), state, buffers))
    return state.constrained(), buffers


def _next_token(model, params, hidden, state, sampling_params, stop_ids, logprobs):
    """Chooses a token from the newest hidden state [B, 1, D]; also returns one column of each `DecodeOutput` field."""
    logits = unembed(model, params, hidden[:, 0])
    key, step_key = jax.random.split(state.key)
    token = sample_token(logits, state.generated, step_key, sampling_params)
    values, ids = jax.lax.top_k(jax.nn.log_softmax(logits), logprobs) if logprobs else (None, None)
    outputs = (token, ~state.done, ids, values)
    state = state.replace(
        token=token,
        position=state.position + 1,
        done=state.done | jnp.isin(token, stop_ids),
        generated=state.generated.at[jnp.arange(token.shape[0]), token].set(True),
        key=key,
    )
    return state, outputs
