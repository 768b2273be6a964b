"""Blockwise attention with an online softmax in plain JAX; cost and memory follow the segments.

Queries and keys are split into blocks. The smallest and largest segment (and, when causal, position) of each block
determine which pairs of blocks can hold an allowed pair of tokens; the others are never computed. A row of packed video
frames therefore costs the sum of the squares of the frames' lengths instead of the square of the row's length. No
[L, S] array is ever created: the backward pass recomputes the probabilities of one pair of blocks at a time
(FlashAttention-2, arXiv 2307.08691).

Dimension names: B rows, L queries, S keys, K key/value heads, G query heads for each of them, D channels of a head.
Inside, the G heads of a group are G rows of a block, so a block of queries is [K, block * G, D].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vl3_jax.kernels import online_softmax
from vl3_jax.kernels.backend import Backend, attend
from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.segment_info import (
    BlockSchedule,
    SegmentInfo,
    active_block_schedule,
    active_blocks,
    pad_to_blocks,
    round_up,
    split_blocks,
)

BLOCK, SHORT_BLOCK = 256, 64  # tokens, for long rows and for short ones, whose segments are short too


def blockwise_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, q_info: SegmentInfo, kv_info: SegmentInfo, *, causal: bool, scale: float
) -> jax.Array:
    """Computes softmax(scale * q k^T) v within equal segments.

    Args:
      q: Queries, [B, L, H, D].
      k: Keys, [B, S, K, D], where K divides H.
      v: Values, [B, S, K, D].
      q_info: Segments and positions of the queries, [B, L], in any order.
      kv_info: Segments and positions of the keys, [B, S], in any order.
      causal: Whether a query attends only to keys at its own or earlier positions.
      scale: Factor of the scores.

    Returns:
      The attention output, [B, L, H, D] in the dtype of `q`; zeros for a query without allowed keys.
    """
    return attend(BLOCKWISE, q, k, v, q_info, kv_info, causal, scale)


class _Blocks(NamedTuple):
    """The operands, split into blocks."""

    q: jax.Array  # [B, q blocks, K, q_block * G, D]
    k: jax.Array  # [B, kv blocks, K, kv_block, D]
    v: jax.Array  # as k
    q_info: SegmentInfo  # [B, q blocks, q_block * G]
    kv_info: SegmentInfo  # [B, kv blocks, kv_block]
    schedule: BlockSchedule  # active blocks of keys of each block of queries


def _split_into_blocks(q, k, v, q_info, kv_info, causal) -> _Blocks:
    group = q.shape[2] // k.shape[2]
    q_block, kv_block = _block_size(q.shape[1]), _block_size(k.shape[1])
    q_info = SegmentInfo(*(pad_to_blocks(x, q_block) for x in q_info))
    kv_info = SegmentInfo(*(pad_to_blocks(x, kv_block) for x in kv_info))
    return _Blocks(
        _split_heads(q, k.shape[2]),
        *(split_blocks(pad_to_blocks(x, kv_block), kv_block).swapaxes(2, 3) for x in (k, v)),
        SegmentInfo(*(jnp.repeat(split_blocks(x, q_block), group, axis=-1) for x in q_info)),
        SegmentInfo(*(split_blocks(x, kv_block) for x in kv_info)),
        active_block_schedule(active_blocks(q_info, kv_info, q_block, kv_block, causal)),
    )


def _split_heads(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, L, K * G, ...] -> [B, blocks, K, block * G, ...]."""
    block = _block_size(x.shape[1])
    x = split_blocks(pad_to_blocks(x, block), block)
    x = x.reshape(*x.shape[:3], kv_heads, -1, *x.shape[4:]).swapaxes(2, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def _join_heads(x: jax.Array, length: int, group: int) -> jax.Array:
    """[B, blocks, K, block * G, ...] -> [B, L, K * G, ...]."""
    x = x.reshape(*x.shape[:3], -1, group, *x.shape[4:]).swapaxes(2, 3)
    return x.reshape(x.shape[0], -1, x.shape[3] * group, *x.shape[5:])[:, :length]


def _scores(q, k, q_info, kv_info, causal, scale):
    """Returns the scores [K, rows, keys] float32 of a pair of blocks, and which of them are allowed."""
    allowed = (q_info.segment_ids[:, None] == kv_info.segment_ids[None]) & (q_info.segment_ids[:, None] > 0)
    if causal:
        allowed &= kv_info.positions[None] <= q_info.positions[:, None]
    return einsum("krd,ksd->krs", q, k, out_dtype=jnp.float32) * scale, allowed


def _forward(q, k, v, q_info, kv_info, *, causal, scale, dtype):
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    q, k, v, q_info, kv_info, schedule = _split_into_blocks(q, k, v, q_info, kv_info, causal)
    rows, q_count, kv_heads, block_rows, width = q.shape

    def q_block_output(index):
        b, i = index
        q_block, q_block_info = q[b, i], SegmentInfo(*(x[b, i] for x in q_info))

        def add_kv_block(step, state):
            j = schedule.order[b, i, step]
            kv_block_info = SegmentInfo(*(x[b, j] for x in kv_info))
            scores, allowed = _scores(q_block, k[b, j], q_block_info, kv_block_info, causal, scale)
            return online_softmax.update(state, scores, allowed, v[b, j], "krs,ksd->krd")

        state = online_softmax.init((kv_heads, block_rows, width))
        out, lse = online_softmax.finalize(lax.fori_loop(0, schedule.count[b, i], add_kv_block, state))
        return out.astype(dtype), lse[..., 0]

    results = lax.map(q_block_output, (jnp.repeat(jnp.arange(rows), q_count), jnp.tile(jnp.arange(q_count), rows)))
    return tuple(_join_heads(x.reshape(rows, q_count, *x.shape[1:]), length, group) for x in results)


def _backward(q, k, v, q_info, kv_info, out, lse, d_out, *, causal, scale, dtype):
    length, kv_length, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    blocks = _split_into_blocks(q, k, v, q_info, kv_info, causal)
    out, lse, d_out = (_split_heads(x, k.shape[2]) for x in (out, lse, d_out))

    def row_gradients(row):
        (q, k, v, q_info, kv_info, schedule), out, lse, d_out = row

        def q_block_gradients(carry, i):
            q_block, d_out_block = q[i], d_out[i]
            q_block_info = SegmentInfo(*(x[i] for x in q_info))
            delta = jnp.sum(d_out_block.astype(jnp.float32) * out[i].astype(jnp.float32), -1, keepdims=True)

            def add_kv_block(step, carry):
                d_q, d_k, d_v = carry
                j = schedule.order[i, step]
                kv_block_info = SegmentInfo(*(x[j] for x in kv_info))
                scores, allowed = _scores(q_block, k[j], q_block_info, kv_block_info, causal, scale)
                weights = jnp.where(allowed, jnp.exp(scores - lse[i][..., None]), 0.0)
                d_weights = einsum("krd,ksd->krs", d_out_block, v[j], out_dtype=jnp.float32)
                d_scores = (scale * weights * (d_weights - delta)).astype(q.dtype)
                d_q += einsum("krs,ksd->krd", d_scores, k[j], out_dtype=jnp.float32)
                d_k_block = einsum("krs,krd->ksd", d_scores, q_block, out_dtype=jnp.float32)
                d_v_block = einsum("krs,krd->ksd", weights.astype(q.dtype), d_out_block, out_dtype=jnp.float32)
                return d_q, d_k.at[j].add(d_k_block), d_v.at[j].add(d_v_block)

            start = (jnp.zeros(q_block.shape, jnp.float32), *carry)
            d_q, d_k, d_v = lax.fori_loop(0, schedule.count[i], add_kv_block, start)
            return (d_k, d_v), d_q.astype(dtype)

        start = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
        (d_k, d_v), d_q = lax.scan(q_block_gradients, start, jnp.arange(q.shape[0]))
        return d_q, d_k.astype(dtype), d_v.astype(dtype)

    d_q, d_k, d_v = lax.map(row_gradients, (blocks, out, lse, d_out))
    d_k, d_v = (_join_heads(x, kv_length, 1) for x in (d_k, d_v))
    return _join_heads(d_q, length, group), d_k, d_v


BLOCKWISE = Backend(_forward, _backward)


def _block_size(length: int) -> int:
    """Returns a sixteenth of the row, within bounds, because every pair of blocks has a fixed cost."""
    return min(max(length // 16 // 8 * 8, SHORT_BLOCK), BLOCK, round_up(length, 8))
