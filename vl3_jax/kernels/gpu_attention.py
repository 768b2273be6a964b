"""Blockwise attention for GPUs: Pallas kernels in Triton, forward and backward (FlashAttention-2, arXiv 2307.08691).

The bounds of the blocks' segments determine which pairs of blocks are processed, as in `vl3_jax.kernels.blockwise`:
each program reads the list of its active blocks and loops over no others. There are three kernels: the output and the
gradient of the queries loop over blocks of keys, the gradients of keys and values over blocks of queries.

Shapes inside a kernel: one head, blocks of queries [q_block, W] and of keys [kv_block, W], where W is the head's
width D rounded up to a power of two, as Triton requires; the channels past D are read as zeros and never written.
A kernel's `AttentionInputs` hold references, and values for the side that is loaded. Exponents are base 2.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from vl3_jax.kernels.backend import AttentionInputs, Backend
from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.segment_info import (
    MASKED,
    SegmentInfo,
    active_block_schedule,
    active_blocks,
    allowed_pairs,
    pad_to_blocks,
)
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


@functools.cache
def gpu_backend(interpret: bool = False) -> Backend:
    """Returns the backend of the kernels, for operands of float32 or of bfloat16.

    Args:
      interpret: Whether to interpret the kernels, which works on any device but is slow.
    """
    return Backend(functools.partial(_forward, interpret=interpret), functools.partial(_backward, interpret=interpret))


def gpu_unsupported_reason(inputs: AttentionInputs) -> str | None:
    """Returns why the kernels do not support these operands, in a few words; None if they do."""
    dtypes = {x.dtype.name for x in (inputs.q, inputs.k, inputs.v)}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        return f"operands of {' and '.join(sorted(dtypes))}"
    width = inputs.q.shape[3]
    if width > MAX_WIDTH:
        return f"heads of {width} channels, more than {MAX_WIDTH}"
    capability = str(getattr(target_device(), "compute_capability", "8.0"))
    if not capability[0].isdigit() or float(capability) < 8.0:
        return f"compute capability {capability}, below 8.0"
    return None


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


def _load_info(info, rows):
    return SegmentInfo(info.segment_ids[rows], info.positions[rows])


def _load_queries(refs: AttentionInputs, rows, width) -> AttentionInputs:
    """Returns the operands with these queries loaded."""
    return refs.replace(q=_load(refs.q, (rows,), width), q_info=_load_info(refs.q_info, rows))


def _load_keys(refs: AttentionInputs, rows, width) -> AttentionInputs:
    """Returns the operands with these keys and values loaded."""
    k, v = _load(refs.k, (rows,), width), _load(refs.v, (rows,), width)
    return refs.replace(k=k, v=v, kv_info=_load_info(refs.kv_info, rows))


def _scores(block: AttentionInputs):
    """Returns the scores [q_block, kv_block] float32, base 2, and which of them are allowed."""
    allowed = allowed_pairs(block.q_info, block.kv_info, block.causal)
    return einsum("rd,sd->rs", block.q, block.k, out_dtype=jnp.float32) * (block.scale * LOG2_E), allowed


def _gradients(block: AttentionInputs, d_out, lse, delta):
    """Returns the softmax weights and the gradient of the unscaled scores, [q_block, kv_block] float32."""
    scores, allowed = _scores(block)
    weights = jnp.where(allowed, jnp.exp2(scores - lse[:, None]), 0.0)
    d_weights = einsum("rd,sd->rs", d_out, block.v, out_dtype=jnp.float32)
    return weights, block.scale * weights * (d_weights - delta[:, None])


def _forward_kernel(refs: AttentionInputs, order, count, out_ref, lse_ref, *, tiles, width):
    queries = _load_queries(refs, pl.ds(0, tiles.q), width)

    def add_kv_block(step, carry):
        row_max, row_sum, out = carry
        block = _load_keys(queries, pl.ds(order[step] * tiles.kv, tiles.kv), width)
        scores, allowed = _scores(block)
        new_row_max = jnp.maximum(row_max, jnp.where(allowed, scores, MASKED).max(-1))
        weights = jnp.where(allowed, jnp.exp2(scores - new_row_max[:, None]), 0.0)
        correction = jnp.exp2(row_max - new_row_max)
        weighted = einsum("rs,sd->rd", weights.astype(block.v.dtype), block.v, out_dtype=jnp.float32)
        return new_row_max, row_sum * correction + weights.sum(-1), out * correction[:, None] + weighted

    row_max = jnp.full(tiles.q, MASKED, jnp.float32)
    start = row_max, jnp.zeros(tiles.q, jnp.float32), jnp.zeros(queries.q.shape, jnp.float32)
    row_max, row_sum, out = lax.fori_loop(0, count[...], add_kv_block, start)
    row_sum = jnp.where(row_sum == 0.0, 1.0, row_sum)
    _store(out_ref, out / row_sum[:, None], width)
    # Exactly MASKED for a query without keys: numbers this large change with every rounding.
    lse_ref[...] = jnp.where(row_max > MASKED / 2, row_max / LOG2_E + jnp.log(row_sum), MASKED)


def _d_q_kernel(refs: AttentionInputs, extra: _BackwardOperands, order, count, d_q_ref, *, tiles, width):
    own_rows = pl.ds(0, tiles.q)
    queries = _load_queries(refs, own_rows, width)
    d_out, lse, delta = _load(extra.d_out, (own_rows,), width), extra.lse[...], extra.delta[...]

    def add_kv_block(step, d_q):
        block = _load_keys(queries, pl.ds(order[step] * tiles.kv, tiles.kv), width)
        _, d_scores = _gradients(block, d_out, lse, delta)
        return d_q + einsum("rs,sd->rd", d_scores.astype(block.k.dtype), block.k, out_dtype=jnp.float32)

    _store(d_q_ref, lax.fori_loop(0, count[...], add_kv_block, jnp.zeros(queries.q.shape, jnp.float32)), width)


def _d_kv_kernel(refs: AttentionInputs, extra: _BackwardOperands, order, count, d_k_ref, d_v_ref, *, tiles, width):
    keys = _load_keys(refs, pl.ds(0, tiles.kv), width)
    group = refs.q.shape[1]

    def add_q_block(step, carry):
        d_k, d_v = carry
        rows, head = pl.ds(order[lax.div(step, group)] * tiles.q, tiles.q), lax.rem(step, group)
        q, d_out = _load(refs.q, (rows, head), width), _load(extra.d_out, (rows, head), width)
        lse, delta = extra.lse[rows, head], extra.delta[rows, head]
        block = keys.replace(q=q, q_info=_load_info(refs.q_info, rows))
        weights, d_scores = _gradients(block, d_out, lse, delta)
        d_k += einsum("rs,rd->sd", d_scores.astype(q.dtype), q, out_dtype=jnp.float32)
        d_v += einsum("rs,rd->sd", weights.astype(q.dtype), d_out, out_dtype=jnp.float32)
        return d_k, d_v

    start = (jnp.zeros(keys.k.shape, jnp.float32), jnp.zeros(keys.v.shape, jnp.float32))
    d_k, d_v = lax.fori_loop(0, count[...] * group, add_q_block, start)
    _store(d_k_ref, d_k, width)
    _store(d_v_ref, d_v, width)


class _Specs(NamedTuple):
    """The part of the arrays of one side, queries or keys, that a program reads or writes."""

    channels: pl.BlockSpec  # for [B, length, heads, D]
    scalars: pl.BlockSpec  # for [B, length, heads]
    info: SegmentInfo  # for [B, length]


def _specs(length: int, width: int, outer: bool, head=lambda h: h, heads: int | None = None) -> _Specs:
    """Returns the specs of program (i, b, h): `length` tokens, of block i if `outer`; head(h), or `heads` of them."""

    def index(i, b, h):
        return b, i if outer else 0, head(h)

    info = pl.BlockSpec((None, length), lambda i, b, h: (b, i if outer else 0))
    return _Specs(
        pl.BlockSpec((None, length, heads, width), lambda i, b, h: (*index(i, b, h), 0)),
        pl.BlockSpec((None, length, heads), index),
        SegmentInfo._make((info, info)),
    )


def _launch(kernel, outer: str, inputs: AttentionInputs, extra: Sequence, active, out_shapes, tiles, interpret):
    """Runs `kernel` on a grid of (blocks, rows, heads).

    Args:
      kernel: Kernel of references to operands, extra operands, the list of active blocks, its length, and outputs.
      outer: Side whose results are written. With "q" a program processes one block of queries of a head and all its
        keys, with "kv" one block of keys of a head and all its queries.
      inputs: Operands of attention, padded to whole blocks.
      extra: Additional operands of the backward pass: none or one `_BackwardOperands`.
      active: Mask of the active pairs, [B, q blocks, kv blocks] bool.
      out_shapes: Shapes and dtypes of the outputs.
      tiles: Tile sizes.
      interpret: Whether to interpret the kernel.

    Returns:
      The outputs.
    """
    width, group = inputs.q.shape[3], inputs.q.shape[2] // inputs.k.shape[2]
    padded_width = max(pl.next_power_of_2(width), MIN_WIDTH)
    if outer == "q":
        own = q_side = _specs(tiles.q, padded_width, outer=True)
        kv_side = _specs(inputs.k.shape[1], padded_width, outer=False, head=lambda h: lax.div(h, group))
    else:
        q_side = _specs(inputs.q.shape[1], padded_width, outer=False, heads=group)
        own = kv_side = _specs(tiles.kv, padded_width, outer=True)
        active = active.swapaxes(1, 2)
    rows, blocks, other_blocks = active.shape
    specs = inputs.replace(
        q=q_side.channels, k=kv_side.channels, v=kv_side.channels, q_info=q_side.info, kv_info=kv_side.info
    )
    extra_specs = [x._replace(d_out=q_side.channels, lse=q_side.scalars, delta=q_side.scalars) for x in extra]
    order = pl.BlockSpec((None, None, other_blocks), lambda i, b, h: (b, i, 0))
    count = pl.BlockSpec((None, None), lambda i, b, h: (b, i))
    return pl.pallas_call(
        functools.partial(kernel, tiles=tiles, width=width),
        grid=(blocks, rows, out_shapes[0].shape[2]),
        in_specs=[specs, *extra_specs, order, count],
        out_specs=[own.channels if len(x.shape) == 4 else own.scalars for x in out_shapes],
        out_shape=out_shapes,
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(inputs, *extra, *active_block_schedule(active))


def _pad_inputs(inputs: AttentionInputs, tiles: Tiles) -> tuple[AttentionInputs, jax.Array]:
    """Pads the operands to whole blocks and finds the active pairs of blocks."""
    q_info, kv_info = pad_to_blocks(inputs.q_info, tiles.q), pad_to_blocks(inputs.kv_info, tiles.kv)
    q, (k, v) = pad_to_blocks(inputs.q, tiles.q), pad_to_blocks((inputs.k, inputs.v), tiles.kv)
    active = active_blocks(q_info, kv_info, tiles.q, tiles.kv, inputs.causal)
    return inputs.replace(q=q, k=k, v=v, q_info=q_info, kv_info=kv_info), active


def _forward(inputs: AttentionInputs, *, dtype, interpret: bool):
    tiles, length = FORWARD[inputs.q.dtype.itemsize], inputs.q.shape[1]
    inputs, active = _pad_inputs(inputs, tiles)
    shape = inputs.q.shape
    out_shapes = [jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:3], jnp.float32)]
    out, lse = _launch(_forward_kernel, "q", inputs, (), active, out_shapes, tiles, interpret)
    return out[:, :length], lse[:, :length]


def _backward(inputs: AttentionInputs, out, lse, d_out, *, dtype, interpret: bool):
    tiles, length, kv_length = BACKWARD[inputs.q.dtype.itemsize], inputs.q.shape[1], inputs.k.shape[1]
    inputs, active = _pad_inputs(inputs, tiles)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1)
    extra = [_BackwardOperands(*(pad_to_blocks(x, tiles.q) for x in (d_out, lse * LOG2_E, delta)))]
    shapes = [jax.ShapeDtypeStruct(x.shape, dtype) for x in (inputs.q, inputs.k, inputs.v)]
    [d_q] = _launch(_d_q_kernel, "q", inputs, extra, active, shapes[:1], tiles, interpret)
    d_k, d_v = _launch(_d_kv_kernel, "kv", inputs, extra, active, shapes[1:], tiles, interpret)
    return d_q[:, :length], d_k[:, :kv_length], d_v[:, :kv_length]
