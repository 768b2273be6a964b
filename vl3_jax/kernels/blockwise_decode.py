"""Attention of a few queries to a cache in plain JAX; each row reads only its own blocks of slots in use.

The cache of all layers is read in place: slicing out a layer would copy every slot, used or not.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from vl3_jax.kernels import online_softmax
from vl3_jax.kernels.backend import AttentionInputs
from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.segment_info import BlockSchedule, active_block_schedule, active_blocks

BLOCK = 256  # slots


def blockwise_decode_attention(inputs: AttentionInputs, layer: jax.Array) -> jax.Array:
    """Equals `dense_attention(inputs.select_layer(layer))`.

    Args:
      inputs: Operands of attention, of which L is small and the keys and values are those of all layers.
      layer: Index of the layer, [] int32.

    Returns:
      The attention output, [B, L, H, D] in the dtype of `q`.
    """
    q, q_info = inputs.q, inputs.q_info
    rows, length, heads, width = q.shape
    slots, kv_heads = inputs.k.shape[2:4]
    block = largest_block(slots, BLOCK)
    grouped_q = q.reshape(rows, length, kv_heads, -1, width).swapaxes(1, 2).reshape(rows, kv_heads, -1, width)
    grouped_q_info = jax.tree.map(lambda x: jnp.repeat(x, heads // kv_heads, axis=-1), q_info)
    order, count = used_blocks(inputs, block)

    def row_output(b):
        row_q, row_info = grouped_q[b], jax.tree.map(lambda x: x[b, :, None], grouped_q_info)

        def add_kv_block(step, state):
            start = order[b, step] * block
            starts, sizes = (layer, b, start, 0, 0), (1, 1, block, kv_heads, width)
            k, v = (lax.dynamic_slice(x, starts, sizes)[0, 0].astype(q.dtype) for x in (inputs.k, inputs.v))
            block_info = jax.tree.map(lambda x: lax.dynamic_slice(x, (b, start), (1, block)), inputs.kv_info)
            allowed = (row_info.segment_ids == block_info.segment_ids) & (row_info.segment_ids > 0)
            if inputs.causal:
                allowed &= block_info.positions <= row_info.positions
            scores = einsum("krd,skd->krs", row_q, k, out_dtype=jnp.float32) * inputs.scale
            return online_softmax.update(state, scores, allowed, v, "krs,skd->krd")

        state = lax.fori_loop(0, count[b], add_kv_block, online_softmax.init(row_q.shape))
        return online_softmax.finalize(state)[0].astype(q.dtype)

    out = lax.map(row_output, jnp.arange(rows))
    return out.reshape(rows, kv_heads, length, -1, width).swapaxes(1, 2).reshape(q.shape)


def used_blocks(inputs: AttentionInputs, block: int) -> BlockSchedule:
    """Lists the blocks of slots that some query of a row may attend to.

    Args:
      inputs: Operands of attention, of which segments and positions are read.
      block: Slots in a block; divides S.

    Returns:
      The schedule of each row, order [B, blocks] and count [B].
    """
    length = inputs.q_info.segment_ids.shape[1]
    active = active_blocks(inputs.q_info, inputs.kv_info, length, block, inputs.causal)
    order, count = active_block_schedule(active)
    return BlockSchedule(order[:, 0], count[:, 0])


def largest_block(slots: int, max_block: int) -> int:
    """Returns the largest block size that divides both `slots` and `max_block`, a power of two."""
    return math.gcd(slots, max_block)
