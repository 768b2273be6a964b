"""Blockwise attention for TPUs: Pallas kernels, forward and backward (FlashAttention-2, arXiv 2307.08691).

The bounds of the blocks' segments determine which pairs of blocks are processed, as in `vl3_jax.kernels.blockwise`;
other pairs cost nothing (`vl3_jax.kernels.tpu_schedule`). A grid step processes several heads at once: all query heads
of a group, which share their keys, and several groups where blocks are small. The gradients of the queries and those of
keys and values are separate kernels, each with the order of block pairs in which its accumulators stay in VMEM.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vl3_jax.kernels.backend import Backend, attend
from vl3_jax.kernels.block_sizes import LANES, BlockSizes, tpu_blocks
from vl3_jax.kernels.segment_info import MASKED, SegmentInfo, active_blocks, pad_to_blocks, round_up
from vl3_jax.kernels.tpu_kernels import LOG2_E, d_kv_kernel, d_q_kernel, forward_kernel
from vl3_jax.kernels.tpu_schedule import Operand, fits_schedule, pair_schedule, run_schedule


def tpu_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_info: SegmentInfo,
    kv_info: SegmentInfo,
    *,
    causal: bool,
    scale: float,
    blocks: BlockSizes | None = None,
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
      blocks: Block sizes to use instead of the tuned ones; those of q and kv are multiples of 128.
      interpret: Whether to interpret the kernels, which works on any device but is slow.

    Returns:
      The attention output, [B, L, H, D] in the dtype of `q`.
    """
    return attend(tpu_backend(blocks, interpret), q, k, v, q_info, kv_info, causal, scale)


@functools.cache
def tpu_backend(blocks: BlockSizes | None = None, interpret: bool = False) -> Backend:
    """Returns the backend of the kernels, compiled for a TPU or interpreted."""
    options = {"blocks": blocks, "interpret": interpret}
    return Backend(functools.partial(_forward, **options), functools.partial(_backward, **options))


def tpu_unsupported_reason(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> str | None:
    """Returns why the kernels do not support these operands, in a few words; None if they do."""
    dtypes = {x.dtype.name for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        return f"operands of {' and '.join(sorted(dtypes))}"
    if q.shape[3] > LANES:
        return f"heads of {q.shape[3]} channels, more than {LANES}"
    blocks = tpu_blocks(q, k, causal)
    if blocks is None:
        return f"{q.shape[2]} heads on {k.shape[2]}, too many to fit VMEM"
    if not fits_schedule(1, *_block_counts(q, k, blocks)):
        return f"rows of {q.shape[1]} queries and {k.shape[1]} keys, too many pairs of blocks"
    return None


class _Operands(NamedTuple):
    """Operands of all kernels, in their layout and with lengths padded to whole blocks.

    Attributes:
      q: Queries, [H, B * L, D].
      k: Keys, [K, B * S, D].
      v: Values, [K, B * S, D].
      q_info: Segments and positions of the queries, [1, 2, B * L].
      kv_info: Segments and positions of the keys, [1, 2, B * S].
      active: Mask of the active block pairs, [B, q blocks, kv blocks] bool.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    q_info: jax.Array
    kv_info: jax.Array
    active: jax.Array


def _prepare_operands(q, k, v, q_info, kv_info, causal, blocks) -> _Operands:
    q_info = SegmentInfo(*(pad_to_blocks(x, blocks.q) for x in q_info))
    kv_info = SegmentInfo(*(pad_to_blocks(x, blocks.kv) for x in kv_info))
    active = active_blocks(q_info, kv_info, blocks.q, blocks.kv, causal)
    # Queries that attend to nothing get a segment that no key has.
    q_info = q_info._replace(segment_ids=jnp.where(q_info.segment_ids > 0, q_info.segment_ids, -1))
    return _Operands(
        _heads_first(q, blocks.q),
        *(_heads_first(x, blocks.kv) for x in (k, v)),
        *(jnp.stack(info).reshape(1, 2, -1) for info in (q_info, kv_info)),
        active,
    )


def _heads_first(x: jax.Array, block: int) -> jax.Array:
    """[B, length, heads, D] -> [heads, B * padded length, D]."""
    x = pad_to_blocks(x, block)
    return x.transpose(2, 0, 1, 3).reshape(x.shape[2], -1, x.shape[3])


def _rows_first(x: jax.Array, rows: int, length: int) -> jax.Array:
    """[heads, B * padded length, D] -> [B, length, heads, D]."""
    return x.reshape(x.shape[0], rows, -1, x.shape[2]).transpose(1, 2, 0, 3)[:, :length]


def _scalars(x: jax.Array, block: int) -> jax.Array:
    """[B, L, H] -> [H, 1, B * padded L]."""
    return _heads_first(x[..., None], block).swapaxes(1, 2)


class _View(NamedTuple):
    """The blocks of each array that a grid step reads or writes.

    Attributes:
      outer: Side whose results are written, "q" or "kv".
      heads: Query heads of a grid step.
      kv_heads: Key/value heads of a grid step.
      blocks: Block sizes.
    """

    outer: str
    heads: int
    kv_heads: int
    blocks: BlockSizes

    def q(self, array, axis=1) -> Operand:
        return Operand(array, self.heads, self.blocks.q, axis, inner=self.outer != "q")

    def kv(self, array) -> Operand:
        return Operand(array, self.kv_heads, self.blocks.kv, inner=self.outer != "kv")

    def info(self, operands: _Operands) -> list[Operand]:
        """Returns segments and positions, those of the outer side first."""
        q = Operand(operands.q_info, 1, self.blocks.q, 2, inner=self.outer != "q")
        kv = Operand(operands.kv_info, 1, self.blocks.kv, 2, inner=self.outer != "kv")
        return [q, kv] if self.outer == "q" else [kv, q]


def _view(outer: str, operands: _Operands, blocks: BlockSizes) -> _View:
    return _View(outer, operands.q.shape[0] // operands.k.shape[0] * blocks.heads, blocks.heads, blocks)


def _run(kernel, view: _View, operands: _Operands, extra, results, scratch, *, causal, scale, interpret):
    """Runs a kernel over its schedule; `extra` are inputs after those that all kernels read."""
    active = operands.active if view.outer == "q" else operands.active.swapaxes(1, 2)
    kernel = functools.partial(kernel, causal=causal, scale=scale, unroll=view.blocks.unroll)
    inputs = [*view.info(operands), view.q(operands.q), view.kv(operands.k), view.kv(operands.v), *extra]
    head_groups = operands.k.shape[0] // view.kv_heads
    return run_schedule(kernel, pair_schedule(active), head_groups, inputs, results, scratch, interpret)


def _block_counts(q: jax.Array, k: jax.Array, blocks: BlockSizes) -> tuple[int, int]:
    """Returns the number of blocks in a row of queries and in a row of keys."""
    return round_up(q.shape[1], blocks.q) // blocks.q, round_up(k.shape[1], blocks.kv) // blocks.kv


def _row_by_row_if_needed(run: Callable) -> Callable:
    """Wraps `run` to choose tuned blocks for None, and to process single rows where the schedule of all is too long."""

    @functools.wraps(run)
    def wrapped(*operands, blocks, causal, **options):
        q, k, *_ = operands
        blocks = blocks or tpu_blocks(q, k, causal)
        run_rows = functools.partial(run, blocks=blocks, causal=causal, **options)
        if fits_schedule(q.shape[0], *_block_counts(q, k, blocks)):
            return run_rows(*operands)

        def run_row(row):
            return jax.tree.map(lambda x: x[0], run_rows(*jax.tree.map(lambda x: x[None], row)))

        return lax.map(run_row, operands)

    return wrapped


@_row_by_row_if_needed
def _forward(q, k, v, q_info, kv_info, *, causal, scale, dtype, blocks, interpret):
    rows, length = q.shape[:2]
    operands = _prepare_operands(q, k, v, q_info, kv_info, causal, blocks)
    view = _view("q", operands, blocks)
    heads, tokens, width = operands.q.shape
    results = [
        view.q(jax.ShapeDtypeStruct(operands.q.shape, dtype)),
        view.q(jax.ShapeDtypeStruct((heads, 1, tokens), jnp.float32), axis=2),
    ]
    scratch = [(view.heads, blocks.q, channels) for channels in (LANES, LANES, width)]
    options = {"causal": causal, "scale": scale, "interpret": interpret}
    out, lse = _run(forward_kernel, view, operands, [], results, scratch, **options)
    # Exactly MASKED for a query without keys: numbers this large change with every rounding.
    lse = jnp.where(lse > MASKED / 2, lse / LOG2_E, MASKED).swapaxes(1, 2)
    lse = _rows_first(lse, rows, length)[..., 0]
    return _rows_first(out, rows, length), lse


@_row_by_row_if_needed
def _backward(q, k, v, q_info, kv_info, out, lse, d_out, *, causal, scale, dtype, blocks, interpret):
    rows, length, kv_length = *q.shape[:2], k.shape[1]
    operands = _prepare_operands(q, k, v, q_info, kv_info, causal, blocks)
    options = {"causal": causal, "scale": scale, "interpret": interpret}
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1)
    lse = lse * LOG2_E
    lse = jnp.where(lse < MASKED / 2, -MASKED, lse)  # exp2(score - lse) is 0 for a query without keys
    d_out = _heads_first(d_out.astype(q.dtype), blocks.q)
    lse, delta = (_scalars(x, blocks.q) for x in (lse, delta))

    def gradients(kernel, outer, arrays, scratch_widths):
        view = _view(outer, operands, blocks)
        extra = [view.q(d_out), view.q(lse, axis=2), view.q(delta, axis=2)]
        outer_side = view.q if outer == "q" else view.kv
        results = [outer_side(jax.ShapeDtypeStruct(x.shape, dtype)) for x in arrays]
        scratch = [(results[0].heads, results[0].block, width) for width in scratch_widths]
        return _run(kernel, view, operands, extra, results, scratch, **options)

    width = operands.q.shape[2]
    [d_q] = gradients(d_q_kernel, "q", [operands.q], (LANES, LANES, width))
    d_k, d_v = gradients(d_kv_kernel, "kv", [operands.k, operands.v], (width, width))
    return _rows_first(d_q, rows, length), *(_rows_first(x, rows, kv_length) for x in (d_k, d_v))
