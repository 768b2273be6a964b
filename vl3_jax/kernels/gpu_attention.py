"""Blockwise attention for GPUs: Pallas kernels in Triton, forward and backward (FlashAttention-2, arXiv 2307.08691).

The bounds of the blocks' segments determine which pairs of blocks are processed, as in `vl3_jax.kernels.blockwise`:
each program reads the list of its active blocks and loops over no others. There are three kernels: the output and the
gradient of the queries loop over blocks of keys, the gradients of keys and values over blocks of queries.

Shapes inside a kernel: one head, blocks of queries [q_block, W] and of keys [kv_block, W], where W is the head's
width D rounded up to a power of two, as Triton requires; the channels past D are read as zeros and never written.
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
from vl3_jax.kernels.segment_info import MASKED, SegmentInfo, active_block_schedule, active_blocks, pad_to_blocks
from vl3_jax.parallel.rules import target_device

LOG2_E = math.log2(math.e)
MIN_WIDTH, MAX_WIDTH = 16, 128  # channels of a head: what Triton can multiply, and what shared memory can hold


class Tiles(NamedTuple):
    """Tile sizes of a kernel.

    Attributes:
      q: Tokens in a block of queries.
      kv: Tokens in a block of keys.
      warps: Warps of a program.
      stages: Pipeline stages of a program.
    """

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
    """Equals `blockwise_attention`.

    Args:
      q: Queries, [B, L, H, D] float32 or bfloat16.
      k: Keys, [B, S, K, D] in the dtype of `q`.
      v: Values, [B, S, K, D] in the dtype of `q`.
      q_info: Segments and positions of the queries, [B, L].
      kv_info: Segments and positions of the keys, [B, S].
      causal: Whether a query attends only to keys at its own or earlier positions.
      scale: Factor of the scores.
      interpret: Whether to interpret the kernels, which works on any device but is slow.

    Returns:
      The attention output, [B, L, H, D] in the dtype of `q`.
    """
    return attend(gpu_backend(interpret), q, k, v, q_info, kv_info, causal, scale)


@functools.cache
def gpu_backend(interpret: bool = False) -> Backend:
    """Returns the backend of the kernels, compiled for a GPU or interpreted."""
    return Backend(functools.partial(_forward, interpret=interpret), functools.partial(_backward, interpret=interpret))


def gpu_unsupported_reason(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> str | None:
    """Returns why the kernels do not support these operands, in a few words; None if they do."""
    dtypes = {x.dtype.name for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        return f"operands of {' and '.join(sorted(dtypes))}"
    if q.shape[3] > MAX_WIDTH:
        return f"heads of {q.shape[3]} channels, more than {MAX_WIDTH}"
    capability = str(getattr(target_device(), "compute_capability", "8.0"))
    if not capability[0].isdigit() or float(capability) < 8.0:
        return f"compute capability {capability}, below 8.0"
    return None


class _Operands(NamedTuple):
    """Inputs of all kernels, padded to whole blocks; also the tree of their references and block specs."""

    q: jax.Array  # [B, L, H, D]
    k: jax.Array  # [B, S, K, D]
    v: jax.Array
    q_info: SegmentInfo  # [B, L]
    kv_info: SegmentInfo  # [B, S]


class _BackwardOperands(NamedTuple):
    """Additional inputs of the backward kernels."""

    d_out: jax.Array  # [B, L, H, D]
    lse: jax.Array  # [B, L, H] float32, base 2
    delta: jax.Array  # [B, L, H] float32, sum over channels of out * d_out


def _load(ref, rows, width):
    """Loads [rows, W] of `ref`, with zeros past `width`."""
    columns = jnp.arange(ref.shape[-1]) < width
    return triton.load(ref.at[(*rows, slice(None))], mask=columns[None], other=0)


def _store(ref, value, width):
    triton.store(ref, value.astype(ref.dtype), mask=(jnp.arange(ref.shape[-1]) < width)[None])


def _scores(q, k, q_info, kv_info, causal, scale):
    """Returns the scores [q_block, kv_block] float32, base 2, and which of them are allowed."""
    allowed = (q_info.segment_ids[:, None] == kv_info.segment_ids[None]) & (q_info.segment_ids[:, None] > 0)
    if causal:
        allowed &= kv_info.positions[None] <= q_info.positions[:, None]
    return einsum("rd,sd->rs", q, k, out_dtype=jnp.float32) * (scale * LOG2_E), allowed


def _gradients(q, k, v, q_info, kv_info, d_out, lse, delta, causal, scale):
    """Returns the softmax weights and the gradient of the unscaled scores, [q_block, kv_block] float32."""
    scores, allowed = _scores(q, k, q_info, kv_info, causal, scale)
    weights = jnp.where(allowed, jnp.exp2(scores - lse[:, None]), 0.0)
    d_weights = einsum("rd,sd->rs", d_out, v, out_dtype=jnp.float32)
    return weights, scale * weights * (d_weights - delta[:, None])


def _load_info(info, rows):
    return SegmentInfo(*(ref[rows] for ref in info))


def _forward_kernel(refs: _Operands, order, count, out_ref, lse_ref, *, tiles, width, causal, scale):
    own_rows = pl.ds(0, tiles.q)
    q, q_info = _load(refs.q, (own_rows,), width), _load_info(refs.q_info, own_rows)

    def add_kv_block(step, carry):
        row_max, row_sum, out = carry
        rows = pl.ds(order[step] * tiles.kv, tiles.kv)
        k, v = _load(refs.k, (rows,), width), _load(refs.v, (rows,), width)
        scores, allowed = _scores(q, k, q_info, _load_info(refs.kv_info, rows), causal, scale)
        new_row_max = jnp.maximum(row_max, jnp.where(allowed, scores, MASKED).max(-1))
        weights = jnp.where(allowed, jnp.exp2(scores - new_row_max[:, None]), 0.0)
        correction = jnp.exp2(row_max - new_row_max)
        weighted = einsum("rs,sd->rd", weights.astype(v.dtype), v, out_dtype=jnp.float32)
        return new_row_max, row_sum * correction + weights.sum(-1), out * correction[:, None] + weighted

    start = (
        jnp.full(tiles.q, MASKED, jnp.float32),
        jnp.zeros(tiles.q, jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    row_max, row_sum, out = lax.fori_loop(0, count[...], add_kv_block, start)
    row_sum = jnp.where(row_sum == 0.0, 1.0, row_sum)
    _store(out_ref, out / row_sum[:, None], width)
    # Exactly MASKED for a query without keys: numbers this large change with every rounding.
    lse_ref[...] = jnp.where(row_max > MASKED / 2, row_max / LOG2_E + jnp.log(row_sum), MASKED)


def _d_q_kernel(refs: _Operands, extra: _BackwardOperands, order, count, d_q_ref, *, tiles, width, causal, scale):
    own_rows = pl.ds(0, tiles.q)
    q, q_info = _load(refs.q, (own_rows,), width), _load_info(refs.q_info, own_rows)
    d_out, lse, delta = _load(extra.d_out, (own_rows,), width), extra.lse[...], extra.delta[...]

    def add_kv_block(step, d_q):
        rows = pl.ds(order[step] * tiles.kv, tiles.kv)
        k, v = _load(refs.k, (rows,), width), _load(refs.v, (rows,), width)
        kv_info = _load_info(refs.kv_info, rows)
        _, d_scores = _gradients(q, k, v, q_info, kv_info, d_out, lse, delta, causal, scale)
        return d_q + einsum("rs,sd->rd", d_scores.astype(k.dtype), k, out_dtype=jnp.float32)

    _store(d_q_ref, lax.fori_loop(0, count[...], add_kv_block, jnp.zeros(q.shape, jnp.float32)), width)


def _d_kv_kernel(
    refs: _Operands, extra: _BackwardOperands, order, count, d_k_ref, d_v_ref, *, tiles, width, causal, scale
):
    own_rows = pl.ds(0, tiles.kv)
    k, v = _load(refs.k, (own_rows,), width), _load(refs.v, (own_rows,), width)
    kv_info = _load_info(refs.kv_info, own_rows)
    group = refs.q.shape[1]

    def add_q_block(step, carry):
        d_k, d_v = carry
        rows, head = pl.ds(order[lax.div(step, group)] * tiles.q, tiles.q), lax.rem(step, group)
        q, d_out = _load(refs.q, (rows, head), width), _load(extra.d_out, (rows, head), width)
        lse, delta = extra.lse[rows, head], extra.delta[rows, head]
        q_info = _load_info(refs.q_info, rows)
        weights, d_scores = _gradients(q, k, v, q_info, kv_info, d_out, lse, delta, causal, scale)
        d_k += einsum("rs,rd->sd", d_scores.astype(q.dtype), q, out_dtype=jnp.float32)
        d_v += einsum("rs,rd->sd", weights.astype(q.dtype), d_out, out_dtype=jnp.float32)
        return d_k, d_v

    start = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    d_k, d_v = lax.fori_loop(0, count[...] * group, add_q_block, start)
    _store(d_k_ref, d_k, width)
    _store(d_v_ref, d_v, width)


class _Specs(NamedTuple):
    """The part of the arrays of one side, queries or keys, that a program reads or writes."""

    channels: pl.BlockSpec  # for [B, length, heads, D]
    scalars: pl.BlockSpec  # for [B, length, heads]
    info: SegmentInfo  # for [B, length]


def _specs(length: int, width: int, block, head, heads: int | None = None) -> _Specs:
    """Returns the specs of program (i, b, h): `length` tokens at block(i), one head or `heads` heads at head(h)."""
    info = pl.BlockSpec((None, length), lambda i, b, h: (b, block(i)))
    return _Specs(
        pl.BlockSpec((None, length, heads, width), lambda i, b, h: (b, block(i), head(h), 0)),
        pl.BlockSpec((None, length, heads), lambda i, b, h: (b, block(i), head(h))),
        SegmentInfo(info, info),
    )


def _padded_width(width: int) -> int:
    return max(pl.next_power_of_2(width), MIN_WIDTH)


def _identity(index):
    return index


def _zero(index):
    return 0


def _specs_by_queries(operands: _Operands, tiles: Tiles) -> tuple[_Specs, _Specs]:
    """Returns the specs of queries and keys for programs over one block of queries of a head and all its keys."""
    width, length = _padded_width(operands.q.shape[3]), operands.k.shape[1]
    group = operands.q.shape[2] // operands.k.shape[2]
    return _specs(tiles.q, width, _identity, _identity), _specs(length, width, _zero, lambda h: lax.div(h, group))


def _specs_by_keys(operands: _Operands, tiles: Tiles) -> tuple[_Specs, _Specs]:
    """Returns the specs of queries and keys for programs over one block of keys of a head and all its queries."""
    width, length = _padded_width(operands.q.shape[3]), operands.q.shape[1]
    group = operands.q.shape[2] // operands.k.shape[2]
    return _specs(length, width, _zero, _identity, group), _specs(tiles.kv, width, _identity, _identity)


def _launch(kernel, sides, operands, extra, active, out_specs, out_shapes, tiles, interpret):
    """Runs `kernel` on a grid of (blocks, rows, heads).

    Args:
      kernel: Kernel of references to operands, extra operands, the list of active blocks, its length, and outputs.
      sides: Specs of queries and of keys.
      operands: Operands of attention.
      extra: Additional operands of the backward pass: none or one `_BackwardOperands`.
      active: Mask of the active pairs, [B, blocks of the program, blocks of the other side] bool.
      out_specs: Specs of the outputs.
      out_shapes: Shapes and dtypes of the outputs.
      tiles: Tile sizes.
      interpret: Whether to interpret the kernel.

    Returns:
      The outputs.
    """
    q_side, kv_side = sides
    rows, blocks, other_blocks = active.shape
    specs = _Operands(q_side.channels, kv_side.channels, kv_side.channels, q_side.info, kv_side.info)
    extra_specs = [_BackwardOperands(q_side.channels, q_side.scalars, q_side.scalars) for _ in extra]
    order = pl.BlockSpec((None, None, other_blocks), lambda i, b, h: (b, i, 0))
    count = pl.BlockSpec((None, None), lambda i, b, h: (b, i))
    return pl.pallas_call(
        functools.partial(kernel, tiles=tiles, width=operands.q.shape[3]),
        grid=(blocks, rows, out_shapes[0].shape[2]),
        in_specs=[specs, *extra_specs, order, count],
        out_specs=out_specs,
        out_shape=out_shapes,
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=kernel.func.__name__.strip("_"),
    )(operands, *extra, *active_block_schedule(active))


def _pad_operands(q, k, v, q_info, kv_info, causal, tiles) -> tuple[_Operands, jax.Array]:
    """Pads the operands to whole blocks and finds the active pairs of blocks."""
    q_info = SegmentInfo(*(pad_to_blocks(x, tiles.q) for x in q_info))
    kv_info = SegmentInfo(*(pad_to_blocks(x, tiles.kv) for x in kv_info))
    q, k, v = pad_to_blocks(q, tiles.q), pad_to_blocks(k, tiles.kv), pad_to_blocks(v, tiles.kv)
    operands = _Operands(q, k, v, q_info, kv_info)
    return operands, active_blocks(q_info, kv_info, tiles.q, tiles.kv, causal)


def _forward(q, k, v, q_info, kv_info, *, causal, scale, dtype, interpret):
    tiles, length = FORWARD[q.dtype.itemsize], q.shape[1]
    operands, active = _pad_operands(q, k, v, q_info, kv_info, causal, tiles)
    sides, shape = _specs_by_queries(operands, tiles), operands.q.shape
    kernel = functools.partial(_forward_kernel, causal=causal, scale=scale)
    out_shapes = [jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:3], jnp.float32)]
    specs = [sides[0].channels, sides[0].scalars]
    out, lse = _launch(kernel, sides, operands, (), active, specs, out_shapes, tiles, interpret)
    return out[:, :length], lse[:, :length]


def _backward(q, k, v, q_info, kv_info, out, lse, d_out, *, causal, scale, dtype, interpret):
    tiles, length, kv_length = BACKWARD[q.dtype.itemsize], q.shape[1], k.shape[1]
    operands, active = _pad_operands(q, k, v, q_info, kv_info, causal, tiles)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1)
    extra = [_BackwardOperands(*(pad_to_blocks(x, tiles.q) for x in (d_out, lse * LOG2_E, delta)))]
    out_shapes = [jax.ShapeDtypeStruct(x.shape, dtype) for x in (operands.q, operands.k, operands.v)]

    sides, kernel = _specs_by_queries(operands, tiles), functools.partial(_d_q_kernel, causal=causal, scale=scale)
    specs = [sides[0].channels]
    [d_q] = _launch(kernel, sides, operands, extra, active, specs, out_shapes[:1], tiles, interpret)

    sides, kernel = _specs_by_keys(operands, tiles), functools.partial(_d_kv_kernel, causal=causal, scale=scale)
    specs, active = [sides[1].channels] * 2, active.swapaxes(1, 2)
    d_k, d_v = _launch(kernel, sides, operands, extra, active, specs, out_shapes[1:], tiles, interpret)
    return d_q[:, :length], d_k[:, :kv_length], d_v[:, :kv_length]
