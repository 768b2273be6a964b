"""Attention of a few queries to a cache in plain JAX; each row reads only its own blocks of slots in use.

The cache of all layers is read in place: slicing out a layer would copy every slot, used or not.
"""

import jax
import jax.numpy as jnp
from jax import lax

from vl3_jax.kernels import online_softmax
from vl3_jax.kernels.decode_inputs import DecodeInputs, DecodeOutputs, flat
from vl3_jax.kernels.dense import masked_attention
from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.keys_values import row_numbers

BLOCK = 256  # slots


def dense_decode_attention(inputs: DecodeInputs) -> DecodeOutputs:
    """Attention of a few new tokens to themselves and to all slots, used or not, of a layer sliced out of the cache."""
    q, k, v = inputs.rotated()
    cached = inputs.keys_values.read(inputs.layer, inputs.rows, q.dtype)
    keys, values = (jnp.concatenate([old, new.swapaxes(1, 2)], axis=2) for old, new in zip(cached, (k, v), strict=True))
    allowed = jnp.concatenate([inputs.schedule.allowed, inputs.schedule.allowed_new], axis=2) != 0
    return DecodeOutputs(flat(masked_attention(q, keys, values, allowed, inputs.scale)), flat(k, v))


def blockwise_decode_attention(inputs: DecodeInputs) -> DecodeOutputs:
    """Equals `dense_decode_attention`; reads the blocks of the schedule."""
    q, new_k, new_v = inputs.rotated()
    cached, (allowed, allowed_new, order, count) = inputs.keys_values, inputs.schedule
    rows, length, heads, width = q.shape
    kv_heads, block = cached.keys.shape[2], inputs.schedule.block
    group = heads // kv_heads
    grouped_q = q.reshape(rows, length, kv_heads, group, width).swapaxes(1, 2).reshape(rows, kv_heads, -1, width)
    cache_rows = row_numbers(inputs.rows, q)

    def row_output(b):
        def block_of(array: jax.Array, scales: jax.Array | None, start: jax.Array) -> jax.Array:
            part = lax.dynamic_slice(array, (inputs.layer, cache_rows[b], 0, start, 0), (1, 1, kv_heads, block, width))[
                0, 0
            ]
            if scales is not None:
                scale = lax.dynamic_slice(scales, (inputs.layer, cache_rows[b], 0, start), (1, 1, kv_heads, block))
                part = part.astype(jnp.float32) * scale[0, 0, :, :, None]
            return part.astype(q.dtype)

        def add(state, k: jax.Array, v: jax.Array, is_allowed: jax.Array):
            scores = einsum("krd,ksd->krs", grouped_q[b], k, out_dtype=jnp.float32) * inputs.scale
            return online_softmax.update(state, scores, jnp.repeat(is_allowed != 0, group, axis=0), v, "krs,ksd->krd")

        def add_kv_block(step, state):
            start = order[b, step] * block
            k = block_of(cached.keys, cached.key_scales, start)
            v = block_of(cached.values, cached.value_scales, start)
            return add(state, k, v, lax.dynamic_slice(allowed, (b, 0, start), (1, length, block))[0])

        state = online_softmax.init(grouped_q.shape[1:])
        state = add(state, new_k[b].swapaxes(0, 1), new_v[b].swapaxes(0, 1), allowed_new[b])
        state = lax.fori_loop(0, count[b], add_kv_block, state)
        return online_softmax.finalize(state)[0].astype(q.dtype)

    out = lax.map(row_output, jnp.arange(rows))
    out = out.reshape(rows, kv_heads, length, group, width).swapaxes(1, 2)
    return DecodeOutputs(out.reshape(rows, length, -1), flat(new_k, new_v))
