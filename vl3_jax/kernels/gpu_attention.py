"""Attention in blocks for GPUs: Pallas kernels in Triton, forward and backward (FlashAttention-2, arXiv 2307.08691).

Which pairs of blocks are visited follows from the bounds of their labels, as in `vl3_jax.kernels.blockwise`: each
program reads a list of the blocks that concern it and loops over no others. Three kernels: the output and the
gradient of the queries go over blocks of keys, those of keys and values over blocks of queries.

Shapes inside a kernel: one head, blocks of queries [q_block, W] and of keys [kv_block, W], where W is the head's
width D rounded up to a power of two, as Triton needs it; the channels past D are read as zeros and never written.
Exponents are base 2.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from vl3_jax.kernels.backend import Backend, attend
from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.segment_info import MASKED, SegmentInfo, active_block_schedule, active_blocks, pad
from vl3_jax.parallel.rules import target_device

LOG2_E = math.log2(math.e)
NARROWEST, WIDEST = 16, 128  # heads: what Triton multiplies, and what shared memory holds


class Tiles(NamedTuple):
    """Rows of a block of queries and of keys; warps and pipeline stages of a program."""

    q: int
    kv: int
    warps: int
    stages: int


# By bytes of a channel. With these, the compiler spills no registers at a width of 128, and a program takes at most
# 73 KiB of shared memory on cards of compute capability 8.0 to 8.9 (the smallest have 99) and 105 KiB on 9.0.
FORWARD = {2: Tiles(128, 64, 8, 2), 4: Tiles(32, 16, 8, 2)}
BACKWARD = {2: Tiles(64, 64, 8, 2), 4: Tiles(32, 16, 8, 1)}


def gpu_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_info: SegmentInfo,
    kv_info: SegmentInfo,
    *,
    causal: bool,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Same contract as `blockwise_attention`; `interpret` runs the kernels step by step on any device."""
    return attend(gpu_backend(interpret), q, k, v, q_info, kv_info, causal, scale)


@functools.cache
def gpu_backend(interpret: bool = False) -> Backend:
    """The kernels, compiled for a GPU or interpreted."""
    return Backend(functools.partial(_forward, interpret=interpret), functools.partial(_backward, interpret=interpret))


def gpu_unsupported_reason(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> str | None:
    """Why the kernels do not take these operands, in a few words; None if they do."""
    dtypes = {x.dtype.name for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        return f"operands of {' and '.join(sorted(dtypes))}"
    if q.shape[3] > WIDEST:
        return f"heads of {q.shape[3]} channels, more than {WIDEST}"
    capability = str(getattr(target_device(), "compute_capability", "8.0"))
    if not capability[0].isdigit() or float(capability) < 8.0:
        return f"compute capability {capability}, below 8.0"
    return None


class _Operands(NamedTuple):
    """What every kernel reads, cut to whole blocks; also the same tree of its references and of their blocks."""

    q: jax.Array  # [B, L, H, D]
    k: jax.Array  # [B, S, K, D]
    v: jax.Array
    q_info: SegmentInfo  # [B, L]
    kv_info: SegmentInfo  # [B, S]


class _Results(NamedTuple):
    """What the backward kernels read besides."""

    d_out: jax.Array  # [B, L, H, D]
    lse: jax.Array  # [B, L, H] float32, base 2
    delta: jax.Array  # [B, L, H] float32, sum over channels of out * d_out


def _load(ref, rows, width):
    """[rows, W] of `ref`, zeros past `width`."""
    columns = jnp.arange(ref.shape[-1]) < width
    return triton.load(ref.at[(*rows, slice(None))], mask=columns[None], other=0)


def _store(ref, value, width):
    triton.store(ref, value.astype(ref.dtype), mask=(jnp.arange(ref.shape[-1]) < width)[None])


def _scores(q, k, q_info, kv_info, causal, scale):
    """Scores [q_block, kv_block] float32, base 2, and which of them are allowed."""
    allowed = (q_info.segment_ids[:, None] == kv_info.segment_ids[None]) & (q_info.segment_ids[:, None] > 0)
    if causal:
        allowed &= kv_info.positions[None] <= q_info.positions[:, None]
    return einsum("rd,sd->rs", q, k, out_dtype=jnp.float32) * (scale * LOG2_E), allowed


def _gradients(q, k, v, q_info, kv_info, d_out, lse, delta, causal, scale):
    """The softmax's weights and the gradient of the scores before `scale`, [q_block, kv_block] float32."""
    scores, allowed = _scores(q, k, q_info, kv_info, causal, scale)
    weights = jnp.where(allowed, jnp.exp2(scores - lse[:, None]), 0.0)
    d_weights = einsum("rd,sd->rs", d_out, v, out_dtype=jnp.float32)
    return weights, scale * weights * (d_weights - delta[:, None])


def _labels(labels, rows):
    return SegmentInfo(*(ref[rows] for ref in labels))


def _forward_kernel(refs: _Operands, order, count, out_ref, log_total_ref, *, tiles, width, causal, scale):
    everything = pl.ds(0, tiles.q)
    q, q_info = _load(refs.q, (everything,), width), _labels(refs.q_info, everything)

    def visit(step, carry):
        peak, total, out = carry
        rows = pl.ds(order[step] * tiles.kv, tiles.kv)
        k, v = _load(refs.k, (rows,), width), _load(refs.v, (rows,), width)
        scores, allowed = _scores(q, k, q_info, _labels(refs.kv_info, rows), causal, scale)
        new_peak = jnp.maximum(peak, jnp.where(allowed, scores, MASKED).max(-1))
        weights = jnp.where(allowed, jnp.exp2(scores - new_peak[:, None]), 0.0)
        shrink = jnp.exp2(peak - new_peak)
        value = einsum("rs,sd->rd", weights.astype(v.dtype), v, out_dtype=jnp.float32)
        return new_peak, total * shrink + weights.sum(-1), out * shrink[:, None] + value

    start = (
        jnp.full(tiles.q, MASKED, jnp.float32),
        jnp.zeros(tiles.q, jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    peak, total, out = lax.fori_loop(0, count[...], visit, start)
    total = jnp.where(total == 0.0, 1.0, total)
    _store(out_ref, out / total[:, None], width)
    # Exactly MASKED where nothing is seen: of numbers so large every rounding shows.
    log_total_ref[...] = jnp.where(peak > MASKED / 2, peak / LOG2_E + jnp.log(total), MASKED)


def _d_q_kernel(refs: _Operands, results: _Results, order, count, d_q_ref, *, tiles, width, causal, scale):
    everything = pl.ds(0, tiles.q)
    q, q_info = _load(refs.q, (everything,), width), _labels(refs.q_info, everything)
    d_out, lse, delta = _load(results.d_out, (everything,), width), results.lse[...], results.delta[...]

    def visit(step, d_q):
        rows = pl.ds(order[step] * tiles.kv, tiles.kv)
        k, v = _load(refs.k, (rows,), width), _load(refs.v, (rows,), width)
        kv_info = _labels(refs.kv_info, rows)
        _, d_scores = _gradients(q, k, v, q_info, kv_info, d_out, lse, delta, causal, scale)
        return d_q + einsum("rs,sd->rd", d_scores.astype(k.dtype), k, out_dtype=jnp.float32)

    _store(d_q_ref, lax.fori_loop(0, count[...], visit, jnp.zeros(q.shape, jnp.float32)), width)


def _d_kv_kernel(refs: _Operands, results: _Results, order, count, d_k_ref, d_v_ref, *, tiles, width, causal, scale):
    everything = pl.ds(0, tiles.kv)
    k, v = _load(refs.k, (everything,), width), _load(refs.v, (everything,), width)
    kv_info = _labels(refs.kv_info, everything)
    group = refs.q.shape[1]

    def visit(step, carry):
        d_k, d_v = carry
        rows, head = pl.ds(order[lax.div(step, group)] * tiles.q, tiles.q), lax.rem(step, group)
        q, d_out = _load(refs.q, (rows, head), width), _load(results.d_out, (rows, head), width)
        lse, delta = results.lse[rows, head], results.delta[rows, head]
        q_info = _labels(refs.q_info, rows)
        weights, d_scores = _gradients(q, k, v, q_info, kv_info, d_out, lse, delta, causal, scale)
        d_k += einsum("rs,rd->sd", d_scores.astype(q.dtype), q, out_dtype=jnp.float32)
        d_v += einsum("rs,rd->sd", weights.astype(q.dtype), d_out, out_dtype=jnp.float32)
        return d_k, d_v

    start = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    d_k, d_v = lax.fori_loop(0, count[...] * group, visit, start)
    _store(d_k_ref, d_k, width)
    _store(d_v_ref, d_v, width)


class _Specs(NamedTuple):
    """Where a program finds its part of the arrays of one side, queries or keys."""

    channels: pl.BlockSpec  # of [B, length, heads, D]
    scalars: pl.BlockSpec  # of [B, length, heads]
    labels: SegmentInfo  # of [B, length]


def _specs(length: int, width: int, block, head, heads: int | None = None) -> _Specs:
    """For the program (i, b, h): `length` rows from block(i) of one head, or of a group of `heads`, at head(h)."""
    labels = pl.BlockSpec((None, length), lambda i, b, h: (b, block(i)))
    return _Specs(
        pl.BlockSpec((None, length, heads, width), lambda i, b, h: (b, block(i), head(h), 0)),
        pl.BlockSpec((None, length, heads), lambda i, b, h: (b, block(i), head(h))),
        SegmentInfo(labels, labels),
    )


def _padded(width: int) -> int:
    return max(pl.next_power_of_2(width), NARROWEST)


def _own(index):
    return index


def _first(index):
    return 0


def _by_queries(operands: _Operands, tiles: Tiles) -> tuple[_Specs, _Specs]:
    """Of queries and keys, for programs of one block of queries of one head and all keys of its group."""
    width, length = _padded(operands.q.shape[3]), operands.k.shape[1]
    group = operands.q.shape[2] // operands.k.shape[2]
    return _specs(tiles.q, width, _own, _own), _specs(length, width, _first, lambda h: lax.div(h, group))


def _by_keys(operands: _Operands, tiles: Tiles) -> tuple[_Specs, _Specs]:
    """Of queries and keys, for programs of one block of keys of one head and all queries of its group."""
    width, length = _padded(operands.q.shape[3]), operands.q.shape[1]
    group = operands.q.shape[2] // operands.k.shape[2]
    return _specs(length, width, _first, _own, group), _specs(tiles.kv, width, _own, _own)


def _launch(kernel, sides, operands, results, active, out, outs, tiles, interpret):
    """Runs `kernel` on a grid of (blocks, rows, heads).

    Args:
      kernel: takes references to operands, results, the list of blocks to visit and its length, and outputs.
      sides: specs of queries and keys.
      operands: of attention; results: none, or those that the backward pass needs.
      active: [B, blocks, blocks to visit] bool.
      out: the specs of the output; outs: the arrays whose shapes and types it has, one for each output.
    """
    q_side, kv_side = sides
    rows, programs, others = active.shape
    specs = _Operands(q_side.channels, kv_side.channels, kv_side.channels, q_side.labels, kv_side.labels)
    order = pl.BlockSpec((None, None, others), lambda i, b, h: (b, i, 0))
    count = pl.BlockSpec((None, None), lambda i, b, h: (b, i))
    return pl.pallas_call(
        functools.partial(kernel, tiles=tiles, width=operands.q.shape[3]),
        grid=(programs, rows, outs[0].shape[2]),
        in_specs=[specs, *(_Results(q_side.channels, q_side.scalars, q_side.scalars) for _ in results), order, count],
        out_specs=out,
        out_shape=outs,
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=kernel.func.__name__.strip("_"),
    )(operands, *results, *active_block_schedule(active))


def _cut(q, k, v, q_info, kv_info, causal, tiles) -> tuple[_Operands, jax.Array]:
    """The operands in whole blocks, and which pairs of blocks are active."""
    q_info, kv_info = SegmentInfo(*(pad(x, tiles.q) for x in q_info)), SegmentInfo(*(pad(x, tiles.kv) for x in kv_info))
    operands = _Operands(pad(q, tiles.q), pad(k, tiles.kv), pad(v, tiles.kv), q_info, kv_info)
    return operands, active_blocks(q_info, kv_info, tiles.q, tiles.kv, causal)


def _forward(q, k, v, q_info, kv_info, *, causal, scale, dtype, interpret):
    tiles, length = FORWARD[q.dtype.itemsize], q.shape[1]
    operands, active = _cut(q, k, v, q_info, kv_info, causal, tiles)
    sides, shape = _by_queries(operands, tiles), operands.q.shape
    kernel = functools.partial(_forward_kernel, causal=causal, scale=scale)
    outs = [jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:3], jnp.float32)]
    specs = [sides[0].channels, sides[0].scalars]
    out, lse = _launch(kernel, sides, operands, (), active, specs, outs, tiles, interpret)
    return out[:, :length], lse[:, :length]


def _backward(q, k, v, q_info, kv_info, out, lse, d_out, *, causal, scale, dtype, interpret):
    tiles, length, kv_length = BACKWARD[q.dtype.itemsize], q.shape[1], k.shape[1]
    operands, active = _cut(q, k, v, q_info, kv_info, causal, tiles)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1)
    results = [_Results(*(pad(x, tiles.q) for x in (d_out, lse * LOG2_E, delta)))]
    outs = [jax.ShapeDtypeStruct(x.shape, dtype) for x in (operands.q, operands.k, operands.v)]

    sides, kernel = _by_queries(operands, tiles), functools.partial(_d_q_kernel, causal=causal, scale=scale)
    specs = [sides[0].channels]
    [d_q] = _launch(kernel, sides, operands, results, active, specs, outs[:1], tiles, interpret)

    sides, kernel = _by_keys(operands, tiles), functools.partial(_d_kv_kernel, causal=causal, scale=scale)
    specs, active = [sides[1].channels] * 2, active.swapaxes(1, 2)
    d_k, d_v = _launch(kernel, sides, operands, results, active, specs, outs[1:], tiles, interpret)
    return d_q[:, :length], d_k[:, :kv_length], d_v[:, :kv_length]
