"""What the engine compiles: look at pictures and frames, read prompts into a cache, decode a few tokens."""

import functools

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
        return jax.tree.map(lambda leaf, axes: constrain(leaf, *axes), self, STATE_AXES)


# Logical axes of a state's arrays.
_ENTRIES, _LABELS, _ROWS = (None, "batch", None, "kv_heads", None), ("batch", None), ("batch",)
STATE_AXES = DecodeState(
    cache=KVCache(keys=_ENTRIES, values=_ENTRIES, segment_ids=_LABELS, positions=_LABELS, length=_ROWS),
    token=_ROWS,
    position=_ROWS,
    done=_ROWS,
    generated=_LABELS,
    key=(),
)

# What a program does not use stays among its arguments, so that the memory the compiler tells of has all weights.
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
    state, column = _next_token(model, params, hidden, state, sampling_params, stops, logprobs)
    return state.placed(), tuple(None if leaf is None else leaf[:, None] for leaf in column)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4,), keep_unused=True)
def decode_steps(model, steps, logprobs, params, state, sampling_params, stops, count):
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
        valid = (~state.done).astype(jnp.int32)[:, None]
        nothing = jnp.full_like(valid, -1)
        arguments = (state.token[:, None], None, nothing, valid, state.position[:, None], state.cache)
        hidden, cache = decode(model, params, *arguments)
        state, column = _next_token(model, params, hidden, state.replace(cache=cache), sampling_params, stops, logprobs)
        new = [leaf for leaf in column if leaf is not None]
        return index + 1, state, tuple(all_.at[:, index].set(one) for all_, one in zip(columns, new, strict=True))

    _, state, columns = jax.lax.while_loop(unfinished, one_step, (jnp.int32(0), state, columns))
    return state.placed(), (*columns, *(None,) * (4 - len(columns)))


def _next_token(model, params, hidden, state, sampling_params, stops, logprobs):
    """Chooses a token from the newest hidden state [B, 1, D]; gives the columns of a `Step`."""
    logits = unembed(model, params, hidden[:, 0])
    key, here = jax.random.split(state.key)
    token = sample_token(logits, state.generated, here, sampling_params)
    valid = ~state.done
    column = (token, valid, None, None)
    if logprobs:
        values, ids = jax.lax.top_k(jax.nn.log_softmax(logits), logprobs)
        column = (token, valid, ids.astype(jnp.int32), values)
    state = state.replace(
        token=token,
        position=state.position + 1,
        done=state.done | jnp.isin(token, stops),
        generated=state.generated.at[jnp.arange(token.shape[0]), token].set(True),
        key=key,
    )
    return state, column
