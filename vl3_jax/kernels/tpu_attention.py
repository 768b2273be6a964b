"""Attention in blocks for TPUs: Pallas kernels, forward and backward (FlashAttention-2, arXiv 2307.08691).

Which pairs of blocks are visited follows from the bounds of their labels, as in `vl3_jax.kernels.blockwise`; others
cost nothing (`vl3_jax.kernels.tpu_schedule`). A visit takes several heads at once: all query heads of a group, which
share their keys, and several groups where blocks are small. The gradients of queries and those of keys and values
are kernels of their own, each with the order of visits in which its sums stay in VMEM.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vl3_jax.kernels.backend import Backend, attend
from vl3_jax.kernels.block_sizes import LANES, BlockSizes, tpu_blocks
from vl3_jax.kernels.segment_info import MASKED, SegmentInfo, active_blocks, pad, round_up
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
    """Same contract as `blockwise_attention`.

    Args:
      q, k, v, q_info, kv_info, causal, scale: see there; q, k and v of one type, float32 or bfloat16.
      blocks: instead of those of the table; q and kv are whole numbers of 128.
      interpret: runs the kernels step by step on any device.
    """
    return attend(tpu_backend(blocks, interpret), q, k, v, q_info, kv_info, causal, scale)


@functools.cache
def tpu_backend(blocks: BlockSizes | None = None, interpret: bool = False) -> Backend:
    """The kernels, compiled for a TPU or interpreted."""
    setting = {"blocks": blocks, "interpret": interpret}
    return Backend(functools.partial(_forward, **setting), functools.partial(_backward, **setting))


def tpu_unsupported_reason(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> str | None:
    """Why the kernels do not take these operands, in a few words; None if they do."""
    dtypes = {x.dtype.name for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {"float32", "bfloat16"}:
        return f"operands of {' and '.join(sorted(dtypes))}"
    if q.shape[3] > LANES:
        return f"heads of {q.shape[3]} channels, more than {LANES}"
    blocks = tpu_blocks(q, k, causal)
    if blocks is None:
        return f"{q.shape[2]} heads on {k.shape[2]}, too many to fit VMEM"
    if not fits_schedule(1, *_counts(q, k, blocks)):
        return f"rows of {q.shape[1]} queries and {k.shape[1]} keys, too many pairs of blocks"
    return None


class _Operands(NamedTuple):
    """What every kernel reads, as it reads it, the lengths padded to whole blocks.

    Attributes:
      q: [H, B * L, D].
      k, v: [K, B * S, D].
      q_info, kv_info: [1, 2, B * L or B * S] segments and positions.
      active: [B, q blocks, kv blocks] bool.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    q_info: jax.Array
    kv_info: jax.Array
    active: jax.Array


def _cut(q, k, v, q_info, kv_info, causal, blocks) -> _Operands:
    q_info = SegmentInfo(*(pad(x, blocks.q) for x in q_info))
    kv_info = SegmentInfo(*(pad(x, blocks.kv) for x in kv_info))
    active = active_blocks(q_info, kv_info, blocks.q, blocks.kv, causal)
    # Queries that see nothing have a segment that no key has.
    q_info = q_info._replace(segment_ids=jnp.where(q_info.segment_ids > 0, q_info.segment_ids, -1))
    return _Operands(
        _heads_first(q, blocks.q),
        *(_heads_first(x, blocks.kv) for x in (k, v)),
        *(jnp.stack(labels).reshape(1, 2, -1) for labels in (q_info, kv_info)),
        active,
    )


def _heads_first(x: jax.Array, block: int) -> jax.Array:
    """[B, length, heads, D] -> [heads, B * padded length, D]."""
    x = pad(x, block)
    return x.transpose(2, 0, 1, 3).reshape(x.shape[2], -1, x.shape[3])


def _rows_first(x: jax.Array, rows: int, length: int) -> jax.Array:
    """[heads, B * padded length, D] -> [B, length, heads, D]."""
    return x.reshape(x.shape[0], rows, -1, x.shape[2]).transpose(1, 2, 0, 3)[:, :length]


def _scalars(x: jax.Array, block: int) -> jax.Array:
    """[B, L, H] -> [H, 1, B * padded L]."""
    return _heads_first(x[..., None], block).swapaxes(1, 2)


class _View(NamedTuple):
    """Which part of every array one visit sees; `outer` is the side whose results are written, "q" or "kv"."""

    outer: str
    heads: int
    kv_heads: int
    blocks: BlockSizes

    def q(self, array, axis=1) -> Operand:
        return Operand(array, self.heads, self.blocks.q, axis, inner=self.outer != "q")

    def kv(self, array) -> Operand:
        return Operand(array, self.kv_heads, self.blocks.kv, inner=self.outer != "kv")

    def labels(self, cut: _Operands) -> list[Operand]:
        q = Operand(cut.q_info, 1, self.blocks.q, 2, inner=self.outer != "q")
        kv = Operand(cut.kv_info, 1, self.blocks.kv, 2, inner=self.outer != "kv")
        return [q, kv] if self.outer == "q" else [kv, q]


def _view(outer: str, cut: _Operands, blocks: BlockSizes) -> _View:
    return _View(outer, cut.q.shape[0] // cut.k.shape[0] * blocks.heads, blocks.heads, blocks)


def _run(kernel, view: _View, cut: _Operands, more, results, scratch, *, causal, scale, interpret):
    """A kernel over its schedule; `more` are operands after those that all kernels read."""
    active = cut.active if view.outer == "q" else cut.active.swapaxes(1, 2)
    kernel = functools.partial(kernel, causal=causal, scale=scale, unroll=view.blocks.unroll)
    operands = [*view.labels(cut), view.q(cut.q), view.kv(cut.k), view.kv(cut.v), *more]
    steps = cut.k.shape[0] // view.kv_heads
    return run_schedule(kernel, pair_schedule(active), steps, operands, results, scratch, interpret)


def _counts(q: jax.Array, k: jax.Array, blocks: BlockSizes) -> tuple[int, int]:
    """Blocks of a row of queries and of a row of keys."""
    return round_up(q.shape[1], blocks.q) // blocks.q, round_up(k.shape[1], blocks.kv) // blocks.kv


def _as_many_rows_as_fit(run: Callable) -> Callable:
    """`run` with blocks of the table for None; row by row where the schedule of all rows is too long."""

    @functools.wraps(run)
    def split(*operands, blocks, causal, **setting):
        q, k, *_ = operands
        blocks = blocks or tpu_blocks(q, k, causal)
        run_rows = functools.partial(run, blocks=blocks, causal=causal, **setting)
        if fits_schedule(q.shape[0], *_counts(q, k, blocks)):
            return run_rows(*operands)

        def run_row(row):
            return jax.tree.map(lambda x: x[0], run_rows(*jax.tree.map(lambda x: x[None], row)))

        return lax.map(run_row, operands)

    return split


@_as_many_rows_as_fit
def _forward(q, k, v, q_info, kv_info, *, causal, scale, dtype, blocks, interpret):
    rows, length = q.shape[:2]
    cut = _cut(q, k, v, q_info, kv_info, causal, blocks)
    view = _view("q", cut, blocks)
    heads, tokens, width = cut.q.shape
    results = [
        view.q(jax.ShapeDtypeStruct(cut.q.shape, dtype)),
        view.q(jax.ShapeDtypeStruct((heads, 1, tokens), jnp.float32), axis=2),
    ]
    scratch = [(view.heads, blocks.q, channels) for channels in (LANES, LANES, width)]
    setting = {"causal": causal, "scale": scale, "interpret": interpret}
    out, lse = _run(forward_kernel, view, cut, [], results, scratch, **setting)
    # Exactly MASKED where nothing is seen: of numbers so large every rounding shows.
    lse = jnp.where(lse > MASKED / 2, lse / LOG2_E, MASKED).swapaxes(1, 2)
    lse = _rows_first(lse, rows, length)[..., 0]
    return _rows_first(out, rows, length), lse


@_as_many_rows_as_fit
def _backward(q, k, v, q_info, kv_info, out, lse, d_out, *, causal, scale, dtype, blocks, interpret):
    rows, length, kv_length = *q.shape[:2], k.shape[1]
    cut = _cut(q, k, v, q_info, kv_info, causal, blocks)
    setting = {"causal": causal, "scale": scale, "interpret": interpret}
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1)
    lse = lse * LOG2_E
    lse = jnp.where(lse < MASKED / 2, -MASKED, lse)  # exp2(score - lse) is 0 without keys
    d_out = _heads_first(d_out.astype(q.dtype), blocks.q)
    lse, delta = (_scalars(x, blocks.q) for x in (lse, delta))

    def gradients(kernel, outer, of, scratch):
        view = _view(outer, cut, blocks)
        more = [view.q(d_out), view.q(lse, axis=2), view.q(delta, axis=2)]
        side = view.q if outer == "q" else view.kv
        results = [side(jax.ShapeDtypeStruct(x.shape, dtype)) for x in of]
        sums = [(results[0].heads, results[0].block, channels) for channels in scratch]
        return _run(kernel, view, cut, more, results, sums, **setting)

    width = cut.q.shape[2]
    [d_q] = gradients(d_q_kernel, "q", [cut.q], (LANES, LANES, width))
    d_k, d_v = gradients(d_kv_kernel, "kv", [cut.k, cut.v], (width, width))
    return _rows_first(d_q, rows, length), *(_rows_first(x, rows, kv_length) for x in (d_k, d_v))
