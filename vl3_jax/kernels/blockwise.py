"""Attention in blocks with an online softmax, in plain JAX: cost and memory follow the segments.

Queries and keys are cut into blocks. From the smallest and largest segment (and, when causal, position) of each
block follows which pairs of blocks can hold an allowed pair at all; the others are never computed. A row of packed
video frames so costs the sum of the squares of the frames' lengths, not the square of the row's, and no [L, S]
array ever exists: the backward pass recomputes the probabilities of one block at a time (FlashAttention-2,
arXiv 2307.08691).

Shapes: B rows, L queries, S keys, K key/value heads, G query heads for each of them, D channels a head. Inside, the
G heads of a group are G rows of a block, so a block of queries is [K, block * G, D].
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.labels import MASKED, Labels, active_blocks, blocks, pad, round_up

BLOCK, SHORT_BLOCK = 256, 64  # of long rows and of short ones, whose segments are short too


def blockwise_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, q_labels: Labels, kv_labels: Labels, *, causal: bool, scale: float
) -> jax.Array:
    """softmax(scale * q k^T) v among equal segments.

    Args:
      q: [B, L, H, D]; k, v: [B, S, K, D], K dividing H.
      q_labels, kv_labels: segments (0 attends to nothing) and positions, in any order.
      causal: whether a key must not be at a later position than the query.

    Returns:
      [B, L, H, D] in the type of q; zeros where nothing may be attended to.
    """
    rows, length, heads, width = q.shape
    kv_length, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    q_block, kv_block = _block_size(length), _block_size(kv_length)

    q_labels = Labels(*(pad(x, q_block) for x in q_labels))
    kv_labels = Labels(*(pad(x, kv_block) for x in kv_labels))
    pairs = _block_pairs(q_labels, kv_labels, q_block, kv_block, causal)
    q_labels = Labels(*(jnp.repeat(blocks(x, q_block), group, axis=-1) for x in q_labels))
    kv_labels = Labels(*(blocks(x, kv_block) for x in kv_labels))

    q_blocks = blocks(pad(q.reshape(rows, length, kv_heads, group, width), q_block), q_block)
    q_blocks = q_blocks.transpose(0, 1, 3, 2, 4, 5).reshape(rows, -1, kv_heads, q_block * group, width)
    k_blocks, v_blocks = (blocks(pad(x, kv_block), kv_block).swapaxes(2, 3) for x in (k, v))

    out = _attend(q_blocks, k_blocks, v_blocks, q_labels, kv_labels, pairs, causal, scale)
    out = out.reshape(rows, -1, kv_heads, q_block, group, width).transpose(0, 1, 3, 2, 4, 5)
    return out.reshape(rows, -1, heads, width)[:, :length]


class _Pairs(NamedTuple):
    """For each block of queries the blocks of keys to visit: order[b, i, :count[b, i]]."""

    order: jax.Array  # [B, q blocks, kv blocks] int32
    count: jax.Array  # [B, q blocks] int32


def _block_pairs(q: Labels, kv: Labels, q_block: int, kv_block: int, causal: bool) -> _Pairs:
    active = active_blocks(q, kv, q_block, kv_block, causal)
    order = jnp.argsort(~active, axis=-1, stable=True).astype(jnp.int32)
    return _Pairs(order, active.sum(-1, dtype=jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(q, k, v, q_labels, kv_labels, pairs, causal, scale):
    return _forward(q, k, v, q_labels, kv_labels, pairs, causal, scale)[0]


def _scores(q, k, q_labels, kv_labels, causal, scale):
    """Scores [K, rows, keys] float32 of one pair of blocks and which of them are allowed."""
    allowed = (q_labels.segment[:, None] == kv_labels.segment[None]) & (q_labels.segment[:, None] > 0)
    if causal:
        allowed &= kv_labels.position[None] <= q_labels.position[:, None]
    return einsum("krd,ksd->krs", q, k, out_dtype=jnp.float32) * scale, allowed


def _forward(q, k, v, q_labels, kv_labels, pairs, causal, scale):
    rows, q_count, kv_heads, height, width = q.shape

    def one_block(index):
        b, i = index
        q_here, labels_here = q[b, i], Labels(*(x[b, i] for x in q_labels))

        def visit(step, carry):
            peak, total, out = carry
            j = pairs.order[b, i, step]
            keys_here = Labels(*(x[b, j] for x in kv_labels))
            scores, allowed = _scores(q_here, k[b, j], labels_here, keys_here, causal, scale)
            new_peak = jnp.maximum(peak, jnp.where(allowed, scores, MASKED).max(-1))
            weights = jnp.where(allowed, jnp.exp(scores - new_peak[..., None]), 0.0)
            shrink = jnp.exp(peak - new_peak)
            value = einsum("krs,ksd->krd", weights.astype(v.dtype), v[b, j], out_dtype=jnp.float32)
            return new_peak, total * shrink + weights.sum(-1), out * shrink[..., None] + value

        start = (
            jnp.full((kv_heads, height), MASKED, jnp.float32),
            jnp.zeros((kv_heads, height), jnp.float32),
            jnp.zeros((kv_heads, height, width), jnp.float32),
        )
        peak, total, out = lax.fori_loop(0, pairs.count[b, i], visit, start)
        total = jnp.where(total == 0.0, 1.0, total)
        return (out / total[..., None]).astype(q.dtype), peak + jnp.log(total)

    out, log_total = lax.map(one_block, (jnp.repeat(jnp.arange(rows), q_count), jnp.tile(jnp.arange(q_count), rows)))
    return out.reshape(q.shape), log_total.reshape(rows, q_count, kv_heads, height)


def _attend_forward(q, k, v, q_labels, kv_labels, pairs, causal, scale):
    out, log_total = _forward(q, k, v, q_labels, kv_labels, pairs, causal, scale)
    return out, (q, k, v, q_labels, kv_labels, pairs, out, log_total)


def _attend_backward(causal, scale, residuals, d_out):
    q, k, v, q_labels, kv_labels, pairs, out, log_total = residuals

    def one_row(row):
        q, k, v, q_labels, kv_labels, pairs, out, log_total, d_out = row

        def one_block(carry, i):
            q_here, d_out_here = q[i], d_out[i]
            labels_here = Labels(*(x[i] for x in q_labels))
            overlap = jnp.sum(d_out_here.astype(jnp.float32) * out[i].astype(jnp.float32), -1, keepdims=True)

            def visit(step, carry):
                d_q, d_k, d_v = carry
                j = pairs.order[i, step]
                keys_here = Labels(*(x[j] for x in kv_labels))
                scores, allowed = _scores(q_here, k[j], labels_here, keys_here, causal, scale)
                weights = jnp.where(allowed, jnp.exp(scores - log_total[i][..., None]), 0.0)
                d_weights = einsum("krd,ksd->krs", d_out_here, v[j], out_dtype=jnp.float32)
                d_scores = (scale * weights * (d_weights - overlap)).astype(q.dtype)
                d_q += einsum("krs,ksd->krd", d_scores, k[j], out_dtype=jnp.float32)
                d_k_here = einsum("krs,krd->ksd", d_scores, q_here, out_dtype=jnp.float32)
                d_v_here = einsum("krs,krd->ksd", weights.astype(q.dtype), d_out_here, out_dtype=jnp.float32)
                return d_q, d_k.at[j].add(d_k_here), d_v.at[j].add(d_v_here)

            start = (jnp.zeros(q_here.shape, jnp.float32), *carry)
            d_q, d_k, d_v = lax.fori_loop(0, pairs.count[i], visit, start)
            return (d_k, d_v), d_q.astype(q.dtype)

        start = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
        (d_k, d_v), d_q = lax.scan(one_block, start, jnp.arange(q.shape[0]))
        return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)

    gradients = lax.map(one_row, (q, k, v, q_labels, kv_labels, pairs, out, log_total, d_out))
    return (*gradients, None, None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _block_size(length: int) -> int:
    """A sixteenth of the row, within bounds: every pair of blocks has a fixed cost, too."""
    return min(max(length // 16 // 8 * 8, SHORT_BLOCK), BLOCK, round_up(length, 8))
