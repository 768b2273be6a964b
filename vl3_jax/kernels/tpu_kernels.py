"""Pallas kernels for TPUs that process one pair of blocks: the output, and the gradients of queries, keys and values.

The side whose results a kernel writes is the outer one (`vl3_jax.kernels.tpu_schedule`). Scores are [keys, queries] in
`d_kv_kernel` and [queries, keys] in the others, so no large matrix is ever transposed. A grid step processes h query
heads of h / G key/value heads, q_block queries and kv_block keys:

  q, d_out, out, d_q       [h, q_block, D]
  k, v, d_k, d_v           [h / G, kv_block, D]
  lse, delta               [h, 1, q_block] float32
  q_info, kv_info          [1, 2, block] int32, segments and positions; no query has segment 0

lse is the log-sum-exp of the scores and delta the sum of out * d_out over channels, as in FlashAttention-2. Exponents
are base 2, the one that the hardware has; so is lse.
"""

import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from vl3_jax.kernels.block_sizes import LANES
from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.segment_info import MASKED
from vl3_jax.kernels.tpu_schedule import is_first, is_last

LOG2_E = math.log2(math.e)


def forward_kernel(pairs, q_info, kv_info, q, k, v, out, lse, *scratch, causal, scale, unroll):
    """Computes the output and lse, which is MASKED for a query that attends to nothing.

    Scratch: row_max in equal lanes and row_sum in lanes that are added up at the last pair, both [h, q_block, LANES];
    the weighted values, [h, q_block, D].
    """
    row_max, row_sum, weighted = scratch
    heads, group = q.shape[0], q.shape[0] // k.shape[0]

    @pl.when(is_first(pairs))
    def _():
        row_max[...] = jnp.full(row_max.shape, MASKED, jnp.float32)
        row_sum[...] = jnp.zeros(row_sum.shape, jnp.float32)
        weighted[...] = jnp.zeros(weighted.shape, jnp.float32)

    mask = _mask(q_info, kv_info, operator.le if causal else None)

    @pl.loop(0, heads, unroll=unroll)
    def _(head):
        kv_head = lax.div(head, group)
        scores = _product("qd,kd->qk", q[head], k[kv_head]) * (scale * LOG2_E) + mask
        new_row_max = jnp.maximum(row_max[head], scores.max(-1, keepdims=True))
        weights = jnp.exp2(scores - _widen(new_row_max, scores.shape[1]))
        correction = jnp.exp2(row_max[head] - new_row_max)
        row_max[head] = new_row_max
        row_sum[head] = row_sum[head] * correction + _fold(weights)
        product = _product("qk,kd->qd", weights.astype(v.dtype), v[kv_head])
        weighted[head] = weighted[head] * _widen(correction, weighted.shape[2]) + product

    @pl.when(is_last(pairs))
    def _():
        @pl.loop(0, heads)
        def _(head):
            has_keys = row_max[head] > MASKED / 2
            sums = jnp.where(has_keys, row_sum[head].sum(-1, keepdims=True), 1.0)
            factor = jnp.where(has_keys, 1.0 / sums, 0.0)
            out[head] = (weighted[head] * _widen(factor, weighted.shape[2])).astype(out.dtype)
            lse[head] = (row_max[head] + jnp.log2(sums)).T[:1]


def d_q_kernel(pairs, q_info, kv_info, q, k, v, d_out, lse, delta, d_q, *scratch, causal, scale, unroll):
    """Computes the gradient of the queries.

    Scratch: lse and delta as columns, [h, q_block, LANES]; the sum of gradients, [h, q_block, D].
    """
    lse_columns, delta_columns, d_q_sum = scratch
    heads, group = q.shape[0], q.shape[0] // k.shape[0]

    @pl.when(is_first(pairs))
    def _():
        d_q_sum[...] = jnp.zeros(d_q_sum.shape, jnp.float32)

        @pl.loop(0, heads)
        def _(head):
            lse_columns[head] = _column(lse[head])
            delta_columns[head] = _column(delta[head])

    mask = _mask(q_info, kv_info, operator.le if causal else None)

    @pl.loop(0, heads, unroll=unroll)
    def _(head):
        kv_head = lax.div(head, group)
        scores = _product("qd,kd->qk", q[head], k[kv_head]) * (scale * LOG2_E) + mask
        weights = jnp.exp2(scores - _widen(lse_columns[head], scores.shape[1]))
        d_weights = _product("qd,kd->qk", d_out[head], v[kv_head])
        d_scores = weights * (d_weights - _widen(delta_columns[head], scores.shape[1]))
        d_q_sum[head] += _product("qk,kd->qd", d_scores.astype(k.dtype), k[kv_head])

    @pl.when(is_last(pairs))
    def _():
        d_q[...] = (d_q_sum[...] * scale).astype(d_q.dtype)


def d_kv_kernel(pairs, kv_info, q_info, q, k, v, d_out, lse, delta, d_k, d_v, *scratch, causal, scale, unroll):
    """Computes the gradients of the keys and values. Scratch: the sums of both, [h / G, kv_block, D]."""
    d_k_sum, d_v_sum = scratch
    heads, group = q.shape[0], q.shape[0] // k.shape[0]

    @pl.when(is_first(pairs))
    def _():
        d_k_sum[...] = jnp.zeros(d_k_sum.shape, jnp.float32)
        d_v_sum[...] = jnp.zeros(d_v_sum.shape, jnp.float32)

    mask = _mask(kv_info, q_info, operator.ge if causal else None)

    @pl.loop(0, heads, unroll=unroll)
    def _(head):
        kv_head = lax.div(head, group)
        scores = _product("kd,qd->kq", k[kv_head], q[head]) * (scale * LOG2_E) + mask
        weights = jnp.exp2(scores - lse[head])
        d_v_sum[kv_head] += _product("kq,qd->kd", weights.astype(q.dtype), d_out[head])
        d_weights = _product("kd,qd->kq", v[kv_head], d_out[head])
        d_scores = weights * (d_weights - delta[head])
        d_k_sum[kv_head] += _product("kq,qd->kd", d_scores.astype(q.dtype), q[head])

    @pl.when(is_last(pairs))
    def _():
        d_k[...] = (d_k_sum[...] * scale).astype(d_k.dtype)
        d_v[...] = d_v_sum[...].astype(d_v.dtype)


def _mask(outer, inner, compare_positions: Callable | None) -> jax.Array:
    """Returns what to add to scores [outer, inner]: 0 for an allowed pair, else MASKED, in which a score vanishes.

    A pair is allowed if the segments are equal and, unless it is None, compare_positions(inner, outer) holds.
    """
    columns, rows = outer[0].T, inner[0]
    allowed = columns[:, :1] == rows[:1]
    if compare_positions is not None:
        allowed &= compare_positions(rows[1:], columns[:, 1:])
    return jnp.where(allowed, 0.0, MASKED)


def _product(equation: str, *operands: jax.Array) -> jax.Array:
    return einsum(equation, *operands, out_dtype=jnp.float32)


def _widen(x: jax.Array, width: int) -> jax.Array:
    """[rows, LANES] of equal lanes -> [rows, width]."""
    return jnp.tile(x, (1, width // LANES)) if width > LANES else x[:, :width]


def _fold(x: jax.Array) -> jax.Array:
    """[rows, width] -> [rows, LANES], sums of every LANES-th column."""
    return jnp.asarray(sum(x[:, start : start + LANES] for start in range(0, x.shape[1], LANES)))


def _column(row: jax.Array) -> jax.Array:
    """[1, rows] -> [rows, LANES] of equal lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T
