"""Attention in blocks with an online softmax, in plain JAX: cost and memory follow the segments.

Queries and keys are cut into blocks. From the smallest and largest segment (and, when causal, position) of each
block follows which pairs of blocks can hold an allowed pair at all; the others are never computed. A row of packed
video frames so costs the sum of the squares of the frames' lengths, not the square of the row's, and no [L, S]
array ever exists: the backward pass recomputes the probabilities of one block at a time (FlashAttention-2,
arXiv 2307.08691).

Shapes: B rows, L queries, S keys, K key/value heads, G query heads for each of them, D channels a head. Inside, the
G heads of a group are G rows of a block, so a block of queries is [K, block * G, D].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vl3_jax.kernels.backend import Backend, attend
from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.online_softmax import finalize, init, update
from vl3_jax.kernels.segment_info import (
    BlockSchedule,
    SegmentInfo,
    active_block_schedule,
    active_blocks,
    blocks,
    pad,
    round_up,
)

BLOCK, SHORT_BLOCK = 256, 64  # of long rows and of short ones, whose segments are short too


def blockwise_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, q_info: SegmentInfo, kv_info: SegmentInfo, *, causal: bool, scale: float
) -> jax.Array:
    """softmax(scale * q k^T) v among equal segments.

    Args:
      q: [B, L, H, D]; k, v: [B, S, K, D], K dividing H.
      q_info, kv_info: segments (0 attends to nothing) and positions, in any order.
      causal: whether a key must not be at a later position than the query.

    Returns:
      [B, L, H, D] in the type of q; zeros where nothing may be attended to.
    """
    return attend(BLOCKWISE, q, k, v, q_info, kv_info, causal, scale)


class _Blocks(NamedTuple):
    """The operands, cut up."""

    q: jax.Array  # [B, q blocks, K, q_block * G, D]
    k: jax.Array  # [B, kv blocks, K, kv_block, D]
    v: jax.Array
    q_info: SegmentInfo  # [B, q blocks, q_block * G]
    kv_info: SegmentInfo  # [B, kv blocks, kv_block]
    visits: BlockSchedule  # of each block of queries


def _cut(q, k, v, q_info, kv_info, causal) -> _Blocks:
    group = q.shape[2] // k.shape[2]
    q_block, kv_block = _block_size(q.shape[1]), _block_size(k.shape[1])
    q_info = SegmentInfo(*(pad(x, q_block) for x in q_info))
    kv_info = SegmentInfo(*(pad(x, kv_block) for x in kv_info))
    return _Blocks(
        _cut_heads(q, k.shape[2]),
        *(blocks(pad(x, kv_block), kv_block).swapaxes(2, 3) for x in (k, v)),
        SegmentInfo(*(jnp.repeat(blocks(x, q_block), group, axis=-1) for x in q_info)),
        SegmentInfo(*(blocks(x, kv_block) for x in kv_info)),
        active_block_schedule(active_blocks(q_info, kv_info, q_block, kv_block, causal)),
    )


def _cut_heads(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, L, K * G, ...] -> [B, blocks, K, block * G, ...]."""
    block = _block_size(x.shape[1])
    x = blocks(pad(x, block), block)
    x = x.reshape(*x.shape[:3], kv_heads, -1, *x.shape[4:]).swapaxes(2, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def _join_heads(x: jax.Array, length: int, group: int) -> jax.Array:
    """[B, blocks, K, block * G, ...] -> [B, L, K * G, ...]."""
    x = x.reshape(*x.shape[:3], -1, group, *x.shape[4:]).swapaxes(2, 3)
    return x.reshape(x.shape[0], -1, x.shape[3] * group, *x.shape[5:])[:, :length]


def _scores(q, k, q_info, kv_info, causal, scale):
    """Scores [K, rows, keys] float32 of one pair of blocks and which of them are allowed."""
    allowed = (q_info.segment_ids[:, None] == kv_info.segment_ids[None]) & (q_info.segment_ids[:, None] > 0)
    if causal:
        allowed &= kv_info.positions[None] <= q_info.positions[:, None]
    return einsum("krd,ksd->krs", q, k, out_dtype=jnp.float32) * scale, allowed


def _forward(q, k, v, q_info, kv_info, *, causal, scale, dtype):
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    q, k, v, q_info, kv_info, visits = _cut(q, k, v, q_info, kv_info, causal)
    rows, q_count, kv_heads, height, width = q.shape

    def one_block(index):
        b, i = index
        q_here, labels_here = q[b, i], SegmentInfo(*(x[b, i] for x in q_info))

        def visit(step, state):
            j = visits.order[b, i, step]
            keys_here = SegmentInfo(*(x[b, j] for x in kv_info))
            scores, allowed = _scores(q_here, k[b, j], labels_here, keys_here, causal, scale)
            return update(state, scores, allowed, v[b, j], "krs,ksd->krd")

        start = init((kv_heads, height, width))
        out, lse = finalize(lax.fori_loop(0, visits.count[b, i], visit, start))
        return out.astype(dtype), lse[..., 0]

    results = lax.map(one_block, (jnp.repeat(jnp.arange(rows), q_count), jnp.tile(jnp.arange(q_count), rows)))
    return tuple(_join_heads(x.reshape(rows, q_count, *x.shape[1:]), length, group) for x in results)


def _backward(q, k, v, q_info, kv_info, out, lse, d_out, *, causal, scale, dtype):
    length, kv_length, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    cut = _cut(q, k, v, q_info, kv_info, causal)
    out, lse, d_out = (_cut_heads(x, k.shape[2]) for x in (out, lse, d_out))

    def one_row(row):
        (q, k, v, q_info, kv_info, visits), out, lse, d_out = row

        def one_block(carry, i):
            q_here, d_out_here = q[i], d_out[i]
            labels_here = SegmentInfo(*(x[i] for x in q_info))
            delta = jnp.sum(d_out_here.astype(jnp.float32) * out[i].astype(jnp.float32), -1, keepdims=True)

            def visit(step, carry):
                d_q, d_k, d_v = carry
                j = visits.order[i, step]
                keys_here = SegmentInfo(*(x[j] for x in kv_info))
                scores, allowed = _scores(q_here, k[j], labels_here, keys_here, causal, scale)
                weights = jnp.where(allowed, jnp.exp(scores - lse[i][..., None]), 0.0)
                d_weights = einsum("krd,ksd->krs", d_out_here, v[j], out_dtype=jnp.float32)
                d_scores = (scale * weights * (d_weights - delta)).astype(q.dtype)
                d_q += einsum("krs,ksd->krd", d_scores, k[j], out_dtype=jnp.float32)
                d_k_here = einsum("krs,krd->ksd", d_scores, q_here, out_dtype=jnp.float32)
                d_v_here = einsum("krs,krd->ksd", weights.astype(q.dtype), d_out_here, out_dtype=jnp.float32)
                return d_q, d_k.at[j].add(d_k_here), d_v.at[j].add(d_v_here)

            start = (jnp.zeros(q_here.shape, jnp.float32), *carry)
            d_q, d_k, d_v = lax.fori_loop(0, visits.count[i], visit, start)
            return (d_k, d_v), d_q.astype(dtype)

        start = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
        (d_k, d_v), d_q = lax.scan(one_block, start, jnp.arange(q.shape[0]))
        return d_q, d_k.astype(dtype), d_v.astype(dtype)

    d_q, d_k, d_v = lax.map(one_row, (cut, out, lse, d_out))
    d_k, d_v = (_join_heads(x, kv_length, 1) for x in (d_k, d_v))
    return _join_heads(d_q, length, group), d_k, d_v


BLOCKWISE = Backend(_forward, _backward)


def _block_size(length: int) -> int:
    """A sixteenth of the row, within bounds: every pair of blocks has a fixed cost, too."""
    return min(max(length // 16 // 8 * 8, SHORT_BLOCK), BLOCK, round_up(length, 8))
