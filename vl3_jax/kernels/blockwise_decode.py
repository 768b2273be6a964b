"""A few queries against a cache: only the blocks of slots in use are read, of each row its own.

The cache of all layers is read in place: a slice of one layer would be a copy of every slot, used or not.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.online_softmax import finalize, init, update
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
    """Same contract as `dense_attention` for k = keys[layer] and v = values[layer].

    Args:
      q: [B, L, H, D], L small.
      keys, values: [layers, B, S, K, D], of any type; layer: [] int32.
      q_info, kv_info: [B, L] and [B, S], in any order.
      causal, scale: as there.
    """
    rows, length, heads, width = q.shape
    slots, kv_heads = keys.shape[2:4]
    block = largest_block(slots, BLOCK)
    q_rows = q.reshape(rows, length, kv_heads, -1, width).swapaxes(1, 2).reshape(rows, kv_heads, -1, width)
    q_rows_labels = SegmentInfo(*(jnp.repeat(x, heads // kv_heads, axis=-1) for x in q_info))
    order, count = used_blocks(q_info, kv_info, block, causal)

    def one_row(b):
        q_here, labels_here = q_rows[b], SegmentInfo(*(x[b, :, None] for x in q_rows_labels))

        def visit(step, state):
            start = order[b, step] * block
            place, size = (layer, b, start, 0, 0), (1, 1, block, kv_heads, width)
            k, v = (lax.dynamic_slice(x, place, size)[0, 0].astype(q.dtype) for x in (keys, values))
            keys_here = SegmentInfo(*(lax.dynamic_slice(x, (b, start), (1, block)) for x in kv_info))
            allowed = (labels_here.segment_ids == keys_here.segment_ids) & (labels_here.segment_ids > 0)
            if causal:
                allowed &= keys_here.positions <= labels_here.positions
            scores = einsum("krd,skd->krs", q_here, k, out_dtype=jnp.float32) * scale
            return update(state, scores, allowed, v, "krs,skd->krd")

        out, _ = finalize(lax.fori_loop(0, count[b], visit, init(q_here.shape)))
        return out.astype(q.dtype)

    out = lax.map(one_row, jnp.arange(rows))
    return out.reshape(rows, kv_heads, length, -1, width).swapaxes(1, 2).reshape(q.shape)


def used_blocks(q_info: SegmentInfo, kv_info: SegmentInfo, block: int, causal: bool) -> BlockSchedule:
    """The blocks of slots that some query of the row may see: order [B, blocks], count [B]."""
    order, count = active_block_schedule(active_blocks(q_info, kv_info, q_info.segment_ids.shape[1], block, causal))
    return BlockSchedule(order[:, 0], count[:, 0])


def largest_block(slots: int, most: int) -> int:
    """Of at most `most` slots (a power of two), such that all slots are whole blocks."""
    return math.gcd(slots, most)
