"""Blockwise attention with an online softmax in plain JAX; cost and memory follow the segments.

Queries and keys are split into blocks. The smallest and largest segment (and, when causal, position) of each block
determine which pairs of blocks can hold an allowed pair of tokens; the others are never computed. A row of packed video
frames therefore costs the sum of the squares of the frames' lengths instead of the square of the row's length. No
[L, S] array is ever created: the backward pass recomputes the probabilities of one pair of blocks at a time
(FlashAttention-2, arXiv 2307.08691).

Dimension names: B rows, L queries, S keys, K key/value heads, G query heads for each of them, D channels of a head.
Inside, the G heads of a group are G rows of a block, so a block of queries is [K, block * G, D].
"""

import jax
import jax.numpy as jnp
from jax import lax

from vl3_jax.kernels import online_softmax
from vl3_jax.kernels.backend import AttentionInputs, Backend
from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.segment_info import (
    BlockSchedule,
    active_block_schedule,
    active_blocks,
    allowed_pairs,
    pad_to_blocks,
    round_up,
    split_blocks,
)

BLOCK, SHORT_BLOCK = 256, 64  # tokens, for long rows and for short ones, whose segments are short too


def _split_into_blocks(inputs: AttentionInputs) -> tuple[AttentionInputs, BlockSchedule]:
    """Splits the operands into blocks, and lists the active blocks of keys of each block of queries.

    Shapes: q [B, q blocks, K, q_block * G, D], k and v [B, kv blocks, K, kv_block, D], q_info
    [B, q blocks, q_block * G], kv_info [B, kv blocks, kv_block].
    """
    kv_heads, group = inputs.k.shape[2], inputs.q.shape[2] // inputs.k.shape[2]
    q_block, kv_block = _block_size(inputs.q.shape[1]), _block_size(inputs.k.shape[1])
    q_info, kv_info = pad_to_blocks(inputs.q_info, q_block), pad_to_blocks(inputs.kv_info, kv_block)
    q = _split_heads(inputs.q, kv_heads)
    k, v = (split_blocks(pad_to_blocks(x, kv_block), kv_block).swapaxes(2, 3) for x in (inputs.k, inputs.v))
    grouped_q_info = jax.tree.map(lambda x: jnp.repeat(split_blocks(x, q_block), group, axis=-1), q_info)
    blocks = inputs.replace(q=q, k=k, v=v, q_info=grouped_q_info, kv_info=split_blocks(kv_info, kv_block))
    return blocks, active_block_schedule(active_blocks(q_info, kv_info, q_block, kv_block, inputs.causal))


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


def _forward(inputs: AttentionInputs, *, dtype):
    length, group = inputs.q.shape[1], inputs.q.shape[2] // inputs.k.shape[2]
    blocks, schedule = _split_into_blocks(inputs)
    rows, q_count, kv_heads, block_rows, width = blocks.q.shape

    def q_block_output(index):
        b, i = index
        q, q_info = jax.tree.map(lambda x: x[b, i], (blocks.q, blocks.q_info))

        def add_kv_block(step, state):
            j = schedule.order[b, i, step]
            kv_info, k = jax.tree.map(lambda x: x[b, j], (blocks.kv_info, blocks.k))
            allowed = allowed_pairs(q_info, kv_info, blocks.causal)
            scores = einsum("krd,ksd->krs", q, k, out_dtype=jnp.float32) * blocks.scale
            return online_softmax.update(state, scores, allowed, blocks.v[b, j], "krs,ksd->krd")

        state = online_softmax.init((kv_heads, block_rows, width))
        out, lse = online_softmax.finalize(lax.fori_loop(0, schedule.count[b, i], add_kv_block, state))
        return out.astype(dtype), lse[..., 0]

    out, lse = lax.map(q_block_output, (jnp.repeat(jnp.arange(rows), q_count), jnp.tile(jnp.arange(q_count), rows)))
    out, lse = (_join_heads(x.reshape(rows, q_count, *x.shape[1:]), length, group) for x in (out, lse))
    return out, lse


def _backward(inputs: AttentionInputs, out, lse, d_out, *, dtype):
    length, group = inputs.q.shape[1], inputs.q.shape[2] // inputs.k.shape[2]
    kv_length, kv_heads = inputs.k.shape[1:3]
    blocks, schedule = _split_into_blocks(inputs)
    out, lse, d_out = (_split_heads(x, kv_heads) for x in (out, lse, d_out))

    def row_gradients(row):
        blocks, schedule, out, lse, d_out = row

        def q_block_gradients(carry, i):
            q, d_out_block, q_info = jax.tree.map(lambda x: x[i], (blocks.q, d_out, blocks.q_info))
            delta = jnp.sum(d_out_block.astype(jnp.float32) * out[i].astype(jnp.float32), -1, keepdims=True)

            def add_kv_block(step, carry):
                d_q, d_k, d_v = carry
                j = schedule.order[i, step]
                kv_info, k = jax.tree.map(lambda x: x[j], (blocks.kv_info, blocks.k))
                allowed = allowed_pairs(q_info, kv_info, blocks.causal)
                scores = einsum("krd,ksd->krs", q, k, out_dtype=jnp.float32) * blocks.scale
                weights = jnp.where(allowed, jnp.exp(scores - lse[i][..., None]), 0.0)
                d_weights = einsum("krd,ksd->krs", d_out_block, blocks.v[j], out_dtype=jnp.float32)
                d_scores = (blocks.scale * weights * (d_weights - delta)).astype(q.dtype)
                d_q += einsum("krs,ksd->krd", d_scores, blocks.k[j], out_dtype=jnp.float32)
                d_k_block = einsum("krs,krd->ksd", d_scores, q, out_dtype=jnp.float32)
                d_v_block = einsum("krs,krd->ksd", weights.astype(q.dtype), d_out_block, out_dtype=jnp.float32)
                return d_q, d_k.at[j].add(d_k_block), d_v.at[j].add(d_v_block)

            start = (jnp.zeros(q.shape, jnp.float32), *carry)
            d_q, d_k, d_v = lax.fori_loop(0, schedule.count[i], add_kv_block, start)
            return (d_k, d_v), d_q.astype(dtype)

        start = (jnp.zeros(blocks.k.shape, jnp.float32), jnp.zeros(blocks.v.shape, jnp.float32))
        (d_k, d_v), d_q = lax.scan(q_block_gradients, start, jnp.arange(blocks.q.shape[0]))
        return d_q, d_k.astype(dtype), d_v.astype(dtype)

    d_q, d_k, d_v = lax.map(row_gradients, (blocks, schedule, out, lse, d_out))
    d_k, d_v = (_join_heads(x, kv_length, 1) for x in (d_k, d_v))
    return _join_heads(d_q, length, group), d_k, d_v


BLOCKWISE = Backend(_forward, _backward)


def _block_size(length: int) -> int:
    """Returns a sixteenth of the row, within bounds, because every pair of blocks has a fixed cost."""
    return min(max(length // 16 // 8 * 8, SHORT_BLOCK), BLOCK, round_up(length, 8))
