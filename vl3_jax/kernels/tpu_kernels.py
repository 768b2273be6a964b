"""What one visit of a pair of blocks does on a TPU: the output, and the gradients of queries and of keys and values.

The side whose results a kernel writes is the outer one (`vl3_jax.kernels.tpu_schedule`): scores are [keys, queries]
in `d_kv_kernel` and [queries, keys] in the others, so no large matrix is ever transposed.
A visit sees h query heads of h / G key/value heads, q_block queries and kv_block keys:

  q, d_out, out, d_q       [h, q_block, D]
  k, v, d_k, d_v           [h / G, kv_block, D]
  lse, overlap       [h, 1, q_block] float32
  labels of either side    [1, 2, block] int32, segments and positions; no segment of queries is 0

Exponents are base 2, the one that the hardware has; so is lse.
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
    """Output and lse, MASKED where nothing is seen.

    Scratch: peaks in equal lanes, and sums that the last visit adds up over lanes, [h, q_block, LANES] both; weighted
    values [h, q_block, D].
    """
    peak, total, value = scratch
    heads, group = q.shape[0], q.shape[0] // k.shape[0]

    @pl.when(is_first(pairs))
    def _():
        peak[...] = jnp.full(peak.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        value[...] = jnp.zeros(value.shape, jnp.float32)

    mask = _mask(q_info, kv_info, operator.le if causal else None)

    @pl.loop(0, heads, unroll=unroll)
    def _(head):
        kv_head = lax.div(head, group)
        scores = _product("qd,kd->qk", q[head], k[kv_head]) * (scale * LOG2_E) + mask
        new_peak = jnp.maximum(peak[head], scores.max(-1, keepdims=True))
        weights = jnp.exp2(scores - _widen(new_peak, scores.shape[1]))
        shrink = jnp.exp2(peak[head] - new_peak)
        peak[head] = new_peak
        total[head] = total[head] * shrink + _fold(weights)
        here = _product("qk,kd->qd", weights.astype(v.dtype), v[kv_head])
        value[head] = value[head] * _widen(shrink, value.shape[2]) + here

    @pl.when(is_last(pairs))
    def _():
        @pl.loop(0, heads)
        def _(head):
            seen = peak[head] > MASKED / 2
            sums = jnp.where(seen, total[head].sum(-1, keepdims=True), 1.0)
            weight = jnp.where(seen, 1.0 / sums, 0.0)
            out[head] = (value[head] * _widen(weight, value.shape[2])).astype(out.dtype)
            lse[head] = (peak[head] + jnp.log2(sums)).T[:1]


def d_q_kernel(pairs, q_info, kv_info, q, k, v, d_out, lse, delta, d_q, *scratch, causal, scale, unroll):
    """Gradient of queries. Scratch: lse and overlap as columns, [h, q_block, LANES], and sums [h, q_block, D]."""
    log_totals, overlaps, d_qs = scratch
    heads, group = q.shape[0], q.shape[0] // k.shape[0]

    @pl.when(is_first(pairs))
    def _():
        d_qs[...] = jnp.zeros(d_qs.shape, jnp.float32)

        @pl.loop(0, heads)
        def _(head):
            log_totals[head] = _column(lse[head])
            overlaps[head] = _column(delta[head])

    mask = _mask(q_info, kv_info, operator.le if causal else None)

    @pl.loop(0, heads, unroll=unroll)
    def _(head):
        kv_head = lax.div(head, group)
        scores = _product("qd,kd->qk", q[head], k[kv_head]) * (scale * LOG2_E) + mask
        weights = jnp.exp2(scores - _widen(log_totals[head], scores.shape[1]))
        d_weights = _product("qd,kd->qk", d_out[head], v[kv_head])
        d_scores = weights * (d_weights - _widen(overlaps[head], scores.shape[1]))
        d_qs[head] += _product("qk,kd->qd", d_scores.astype(k.dtype), k[kv_head])

    @pl.when(is_last(pairs))
    def _():
        d_q[...] = (d_qs[...] * scale).astype(d_q.dtype)


def d_kv_kernel(pairs, kv_info, q_info, q, k, v, d_out, lse, delta, d_k, d_v, *scratch, causal, scale, unroll):
    """Gradients of keys and values. Scratch: sums [h / G, kv_block, D] of both."""
    d_ks, d_vs = scratch
    heads, group = q.shape[0], q.shape[0] // k.shape[0]

    @pl.when(is_first(pairs))
    def _():
        d_ks[...] = jnp.zeros(d_ks.shape, jnp.float32)
        d_vs[...] = jnp.zeros(d_vs.shape, jnp.float32)

    mask = _mask(kv_info, q_info, operator.ge if causal else None)

    @pl.loop(0, heads, unroll=unroll)
    def _(head):
        kv_head = lax.div(head, group)
        scores = _product("kd,qd->kq", k[kv_head], q[head]) * (scale * LOG2_E) + mask
        weights = jnp.exp2(scores - lse[head])
        d_vs[kv_head] += _product("kq,qd->kd", weights.astype(q.dtype), d_out[head])
        d_weights = _product("kd,qd->kq", v[kv_head], d_out[head])
        d_scores = weights * (d_weights - delta[head])
        d_ks[kv_head] += _product("kq,qd->kd", d_scores.astype(q.dtype), q[head])

    @pl.when(is_last(pairs))
    def _():
        d_k[...] = (d_ks[...] * scale).astype(d_k.dtype)
        d_v[...] = d_vs[...].astype(d_v.dtype)


def _mask(outer, inner, in_time: Callable | None) -> jax.Array:
    """What to add to scores [outer, inner]: 0 where a pair is allowed, else MASKED, which swallows the score.

    Allowed is an equal segment and, unless it is None, in_time(inner position, outer position).
    """
    columns, rows = outer[0].T, inner[0]
    allowed = columns[:, :1] == rows[:1]
    if in_time is not None:
        allowed &= in_time(rows[1:], columns[:, 1:])
    return jnp.where(allowed, 0.0, MASKED)


def _product(equation: str, *operands: jax.Array) -> jax.Array:
    return einsum(equation, *operands, out_dtype=jnp.float32)


def _widen(x: jax.Array, width: int) -> jax.Array:
    """[rows, LANES] of equal lanes -> [rows, width]."""
    return jnp.tile(x, (1, width // LANES)) if width > LANES else x[:, :width]


def _fold(x: jax.Array) -> jax.Array:
    """[rows, width] -> [rows, LANES], sums of every LANES-th column."""
    return sum(x[:, start : start + LANES] for start in range(0, x.shape[1], LANES))


def _column(row: jax.Array) -> jax.Array:
    """[1, rows] -> [rows, LANES] of equal lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T
