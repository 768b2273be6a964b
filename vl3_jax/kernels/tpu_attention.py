"""Blockwise attention for TPUs: Pallas kernels, forward and backward (FlashAttention-2, arXiv 2307.08691).

The bounds of the blocks' segments determine which pairs of blocks are processed, as in `vl3_jax.kernels.blockwise`;
other pairs cost nothing (`vl3_jax.kernels.tpu_schedule`). A grid step processes several heads at once: all query heads
of a group, which share their keys, and several groups where blocks are small. The gradients of the queries and those of
keys and values are separate kernels, each with the order of block pairs in which its accumulators stay in VMEM. Other
kernels bring heads into the layout of these and back (`vl3_jax.kernels.tpu_layout`).
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from vl3_jax.kernels.backend import AttentionInputs, Backend
from vl3_jax.kernels.block_sizes import LANES, BlockSizes, tpu_blocks
from vl3_jax.kernels.segment_info import MASKED, active_blocks, pad_to_blocks, round_up
from vl3_jax.kernels.tpu_kernels import LOG2_E, d_kv_kernel, d_q_kernel, forward_kernel
from vl3_jax.kernels.tpu_layout import heads_first, heads_first_with_delta, tokens_first
from vl3_jax.kernels.tpu_schedule import Operand, fits_schedule, run_schedule


@functools.cache
def tpu_backend(blocks: BlockSizes | None = None, interpret: bool = False) -> Backend:
    """Returns the backend of the kernels, for operands of float32 or of bfloat16.

    Args:
      blocks: Block sizes to use instead of the tuned ones; those of q and kv are multiples of 128.
      interpret: Whether to interpret the kernels, which works on any device but is slow.
    """
    options = {"blocks": blocks, "interpret": interpret}
    return Backend(functools.partial(_forward, **options), functools.partial(_backward, **options), rotates=True)


def tpu_unsupported_reason(inputs: AttentionInputs) -> str | None:
    """Returns why the kernels do not support these operands, in a few words; None if they do."""
    dtypes = {x.dtype.name for x in (inputs.q, inputs.k, inputs.v)}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        return f"operands of {' and '.join(sorted(dtypes))}"
    _, length, heads, width = inputs.q.shape
    _, kv_length, kv_heads, _ = inputs.k.shape
    if width > LANES and width % (2 * LANES):
        return f"heads of {width} channels, more than {LANES} and no multiple of {2 * LANES}"
    blocks = tpu_blocks(inputs)
    if blocks is None:
        return f"{heads} heads on {kv_heads}, too many to fit VMEM"
    if not fits_schedule(1, *_block_counts(inputs, blocks)):
        return f"rows of {length} queries and {kv_length} keys, too many pairs of blocks"
    return None


def _kernel_operands(
    inputs: AttentionInputs, blocks: BlockSizes, interpret: bool
) -> tuple[tuple[Operand, ...], jax.Array]:
    """Brings the operands into the layout of the kernels, with lengths padded to whole blocks.

    Returns:
      Rotated q [H, B * L, W] and k, and v [K, B * S, W], where W is D rounded up to whole registers; the segments and
      positions of the queries [1, 2, B * L] and of the keys [1, 2, B * S]; and the mask of the active block pairs,
      [B, q blocks, kv blocks] bool.
    """
    q_info, kv_info = pad_to_blocks(inputs.q_info, blocks.q), pad_to_blocks(inputs.kv_info, blocks.kv)
    active = active_blocks(q_info, kv_info, blocks.q, blocks.kv, inputs.causal)
    # Queries that attend to nothing get a segment that no key has.
    q_info = q_info._replace(segment_ids=jnp.where(q_info.segment_ids > 0, q_info.segment_ids, -1))
    q_heads = inputs.q.shape[2] // inputs.k.shape[2] * blocks.heads

    def operand(x: jax.Array, rotary: jax.Array | None, heads: int, block: int, side: str) -> Operand:
        table = None if rotary is None else _flat(rotary, block)
        return Operand(heads_first(_flat(x, block), x.shape[2], table, interpret), heads, block, side)

    q = operand(inputs.q, inputs.rotary, q_heads, blocks.q, "q")
    k = operand(inputs.k, inputs.rotary, blocks.heads, blocks.kv, "kv")
    v = operand(inputs.v, None, blocks.heads, blocks.kv, "kv")
    q_info, kv_info = (
        side._replace(array=jnp.stack(info).reshape(1, 2, -1), heads=1, axis=2)
        for side, info in ((q, q_info), (k, kv_info))
    )
    return (q, k, v, q_info, kv_info), active


def _flat(x: jax.Array, block: int) -> jax.Array:
    """[B, length, ...] -> [B * padded length, channels]."""
    rows, length = x.shape[:2]
    return pad_to_blocks(x.reshape(rows, length, -1), block).reshape(-1, math.prod(x.shape[2:]))


def _as_given(x: jax.Array, like: jax.Array, rotary: jax.Array | None, block: int, interpret: bool) -> jax.Array:
    """[heads, B * padded length, W] -> [B, length, heads, D], rotated back."""
    rows, length, heads, width = like.shape
    table = None if rotary is None else _flat(rotary, block)
    return tokens_first(x, width, table, interpret).reshape(rows, -1, heads, width)[:, :length]


def _block_counts(inputs: AttentionInputs, blocks: BlockSizes) -> tuple[int, int]:
    """Returns the number of blocks in a row of queries and in a row of keys."""
    return round_up(inputs.q.shape[1], blocks.q) // blocks.q, round_up(inputs.k.shape[1], blocks.kv) // blocks.kv


def _row_by_row_if_needed(run: Callable) -> Callable:
    """Wraps `run` to choose tuned blocks for None, and to process single rows where the schedule of all is too long."""

    @functools.wraps(run)
    def wrapped(inputs: AttentionInputs, *arrays: jax.Array, blocks: BlockSizes | None, **options):
        blocks = blocks or tpu_blocks(inputs)
        assert blocks is not None, tpu_unsupported_reason(inputs)
        run_rows = functools.partial(run, blocks=blocks, **options)
        if fits_schedule(inputs.q.shape[0], *_block_counts(inputs, blocks)):
            return run_rows(inputs, *arrays)

        def run_row(row):
            return jax.tree.map(lambda x: x[0], run_rows(*jax.tree.map(lambda x: x[None], row)))

        return lax.map(run_row, (inputs, *arrays))

    return wrapped


@_row_by_row_if_needed
def _forward(inputs: AttentionInputs, *, dtype, blocks: BlockSizes, interpret: bool):
    rows, length = inputs.q.shape[:2]
    (q, k, v, q_info, kv_info), active = _kernel_operands(inputs, blocks, interpret)
    heads, tokens, width = q.array.shape
    results = [
        q._replace(array=jax.ShapeDtypeStruct(q.array.shape, dtype)),
        q._replace(array=jax.ShapeDtypeStruct((heads, 1, tokens), jnp.float32), axis=2),
    ]
    kernel = functools.partial(forward_kernel, causal=inputs.causal, scale=inputs.scale, unroll=blocks.unroll)
    operands = q_info, kv_info, q, k, v
    out, lse = run_schedule(kernel, active, operands, results, (LANES, LANES, width), interpret)
    # Exactly MASKED for a query without keys: numbers this large change with every rounding.
    lse = jnp.where(lse > MASKED / 2, lse / LOG2_E, MASKED)
    lse = lse.reshape(heads, rows, -1).transpose(1, 2, 0)[:, :length]
    return _as_given(out, inputs.q, None, blocks.q, interpret), lse


@_row_by_row_if_needed
def _backward(inputs: AttentionInputs, out, lse, d_out, *, dtype, blocks: BlockSizes, interpret: bool):
    heads = inputs.q.shape[2]
    (q, k, v, q_info, kv_info), active = _kernel_operands(inputs, blocks, interpret)
    width = q.array.shape[2]
    lse = lse * LOG2_E
    lse = jnp.where(lse < MASKED / 2, -MASKED, lse)  # exp2(score - lse) is 0 for a query without keys
    lse = pad_to_blocks(lse, blocks.q).transpose(2, 0, 1).reshape(heads, 1, -1)
    d_out = _flat(d_out.astype(inputs.q.dtype), blocks.q)
    d_out, delta = heads_first_with_delta(d_out, _flat(out, blocks.q), heads, interpret)
    lse, delta = (q._replace(array=x, axis=2) for x in (lse, delta))
    operands = q, k, v, q._replace(array=d_out), lse, delta

    def gradients(kernel, info, inputs_of_results, scratch_widths):
        kernel = functools.partial(kernel, causal=inputs.causal, scale=inputs.scale, unroll=blocks.unroll)
        results = [x._replace(array=jax.ShapeDtypeStruct(x.array.shape, dtype)) for x in inputs_of_results]
        return run_schedule(kernel, active, (*info, *operands), results, scratch_widths, interpret)

    [d_q] = gradients(d_q_kernel, (q_info, kv_info), [q], (LANES, LANES, width))
    d_k, d_v = gradients(d_kv_kernel, (kv_info, q_info), [k, v], (width, width))
    return (
        _as_given(d_q, inputs.q, inputs.rotary, blocks.q, interpret),
        _as_given(d_k, inputs.k, inputs.rotary, blocks.kv, interpret),
        _as_given(d_v, inputs.v, None, blocks.kv, interpret),
    )
