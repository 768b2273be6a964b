"""Attention of a few queries to a cache in plain JAX; each row reads only its own blocks of slots in use.

The cache of all layers is read in place: slicing out a layer would copy every slot, used or not.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from vl3_jax.kernels import online_softmax
from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.segment_info import BlockSchedule, SegmentInfo, active_block_schedule, active_blocks

BLOCK = 256  # slots


def blockwise_decode_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array,
    q_info: SegmentInfo,
    kv_info: SegmentInfo,
    *,
    causal: bool,
    scale: float,
) -> jax.Array:
    """Equals `dense_attention` for k = keys[layer] and v = values[layer].

    Args:
      q: Queries, [B, L, H, D], where L is small.
      keys: Cached keys of all layers, [layers, B, S, K, D] of any dtype.
      values: Cached values of all layers, [layers, B, S, K, D].
      layer: Index of the layer, [] int32.
      q_info: Segments and positions of the queries, [B, L], in any order.
      kv_info: Segments and positions of the slots, [B, S], in any order.
      causal: Whether a query attends only to keys at its own or earlier positions.
      scale: Factor of the scores.

    Returns:
      The attention output, [B, L, H, D] in the dtype of `q`.
    """
    rows, length, heads, width = q.shape
    slots, kv_heads = keys.shape[2:4]
    block = largest_block(slots, BLOCK)
    grouped_q = q.reshape(rows, length, kv_heads, -1, width).swapaxes(1, 2).reshape(rows, kv_heads, -1, width)
    grouped_q_info = SegmentInfo(*(jnp.repeat(x, heads // kv_heads, axis=-1) for x in q_info))
    order, count = used_blocks(q_info, kv_info, block, causal)

    def row_output(b):
        row_q, row_info = grouped_q[b], SegmentInfo(*(x[b, :, None] for x in grouped_q_info))

        def add_kv_block(step, state):
            start = order[b, step] * block
            starts, sizes = (layer, b, start, 0, 0), (1, 1, block, kv_heads, width)
            k, v = (lax.dynamic_slice(x, starts, sizes)[0, 0].astype(q.dtype) for x in (keys, values))
            block_info = SegmentInfo(*(lax.dynamic_slice(x, (b, start), (1, block)) for x in kv_info))
            allowed = (row_info.segment_ids == block_info.segment_ids) & (row_info.segment_ids > 0)
            if causal:
                allowed &= block_info.positions <= row_info.positions
            scores = einsum("krd,skd->krs", row_q, k, out_dtype=jnp.float32) * scale
            return online_softmax.update(state, scores, allowed, v, "krs,skd->krd")

        state = lax.fori_loop(0, count[b], add_kv_block, online_softmax.init(row_q.shape))
        out, _ = online_softmax.finalize(state)
        return out.astype(q.dtype)

    out = lax.map(row_output, jnp.arange(rows))
    return out.reshape(rows, kv_heads, length, -1, width).swapaxes(1, 2).reshape(q.shape)


def used_blocks(q_info: SegmentInfo, kv_info: SegmentInfo, block: int, causal: bool) -> BlockSchedule:
    """Lists the blocks of slots that some query of a row may attend to.

    Args:
      q_info: Segments and positions of the queries, [B, L].
      kv_info: Segments and positions of the slots, [B, S].
      block: Slots in a block; divides S.
      causal: Whether a query attends only to keys at its own or earlier positions.

    Returns:
      The schedule of each row, order [B, blocks] and count [B].
    """
    order, count = active_block_schedule(active_blocks(q_info, kv_info, q_info.segment_ids.shape[1], block, causal))
    return BlockSchedule(order[:, 0], count[:, 0])


def largest_block(slots: int, max_block: int) -> int:
    """Returns the largest block size that divides both `slots` and `max_block`, a power of two."""
    return math.gcd(slots, max_block)
