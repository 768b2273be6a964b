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

    def constrained(self) -> "DecodeState":
        """Constrains every array to `STATE_AXES`, so that each call accepts what the previous call returned."""
        return jax.tree.map(lambda leaf, axes: constrain(leaf, *axes), self, STATE_AXES)


def _axes(*names: str | None) -> Any:
    """Returns the logical axes of an array, to stand in the array's place in a state."""
    return names


# Logical axes of the arrays of a state.
_KV, _TOKENS, _ROWS = _axes(None, "batch", None, "kv_heads", None), _axes("batch", None), _axes("batch")
STATE_AXES = DecodeState(
    cache=KVCache(keys=_KV, values=_KV, segment_ids=_TOKENS, positions=_TOKENS, length=_ROWS),
    token=_ROWS,
    position=_ROWS,
    done=_ROWS,
    generated=_TOKENS,
    key=_axes(),
)

# `keep_unused`: the compiler's memory analysis then counts all weights as arguments of every program.
encode_vision = functools.partial(jax.jit, static_argnums=0, keep_unused=True)(encode)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), keep_unused=True)
def prefill(
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
    sampling_params,
    stop_ids,
):
    """Writes the prompts into a new cache of `slots` slots and chooses each row's first token.

    Returns:
      A `DecodeState`, and the fields of a `DecodeOutput` with n = 1.
    """
    cache = KVCache.empty(model.config.text, tokens.shape[0], slots, cache_dtype)
    hidden, cache = decode(model, params, tokens, features, vision_slot, segment_ids, positions, cache)
    assert cache is not None  # while tracing: `decode` returns a cache if it was given one
    last = jnp.maximum(cache.length - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    rows, vocab_size = tokens.shape[0], model.config.text.vocab_size
    state = DecodeState(
        cache=cache,
        token=jnp.zeros(rows, jnp.int32),
        position=last,
        done=cache.length == 0,
        generated=jnp.zeros((rows, vocab_size), bool),
        key=key,
    )
    state, outputs = _next_token(model, params, hidden, state, sampling_params, stop_ids, logprobs)
    return state.constrained(), tuple(None if leaf is None else leaf[:, None] for leaf in outputs)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,), keep_unused=True)
def decode_steps(model, max_steps, logprobs, params, state, sampling_params, stop_ids, num_steps):
    """Decodes `num_steps` <= `max_steps` tokens, or fewer once every row has stopped.

    Returns:
      The new `DecodeState`, and the fields of a `DecodeOutput` with n = `max_steps`; only the first `num_steps` columns
      are filled.
    """
    rows = state.token.shape[0]
    specs = [(jnp.int32, ()), (jnp.bool_, ())]
    specs += [(jnp.int32, (logprobs,)), (jnp.float32, (logprobs,))] if logprobs else []
    buffers = tuple(jnp.zeros((rows, max_steps, *shape), dtype) for dtype, shape in specs)

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
        columns = [leaf for leaf in outputs if leaf is not None]
        buffers = tuple(buffer.at[:, index].set(column) for buffer, column in zip(buffers, columns, strict=True))
        return index + 1, state, buffers

    _, state, buffers = jax.lax.while_loop(unfinished, one_step, (jnp.int32(0), state, buffers))
    return state.constrained(), (*buffers, *(None,) * (4 - len(buffers)))


def _next_token(model, params, hidden, state, sampling_params, stop_ids, logprobs):
    """Chooses a token from the newest hidden state [B, 1, D]; also returns one column of each `DecodeOutput` field."""
    logits = unembed(model, params, hidden[:, 0])
    key, step_key = jax.random.split(state.key)
    token = sample_token(logits, state.generated, step_key, sampling_params)
    valid = ~state.done
    outputs = (token, valid, None, None)
    if logprobs:
        values, ids = jax.lax.top_k(jax.nn.log_softmax(logits), logprobs)
        outputs = (token, valid, ids.astype(jnp.int32), values)
    state = state.replace(
        token=token,
        position=state.position + 1,
        done=state.done | jnp.isin(token, stop_ids),
        generated=state.generated.at[jnp.arange(token.shape[0]), token].set(True),
        key=key,
    )
    return state, outputs
