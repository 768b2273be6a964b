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
from vl3_jax.kernels.block_sizes import LANES, Blocks, tpu_blocks
from vl3_jax.kernels.labels import MASKED, Labels, active_blocks, pad, round_up
from vl3_jax.kernels.tpu_kernels import LOG2_E, d_kv_kernel, d_q_kernel, forward_kernel
from vl3_jax.kernels.tpu_schedule import Operand, fits_schedule, run_schedule, schedule


def tpu_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_labels: Labels,
    kv_labels: Labels,
    *,
    causal: bool,
    scale: float,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Same contract as `blockwise_attention`.

    Args:
      q, k, v, q_labels, kv_labels, causal, scale: see there; q, k and v of one type, float32 or bfloat16.
      blocks: instead of those of the table; q and kv are whole numbers of 128.
      interpret: runs the kernels step by step on any device.
    """
    return attend(tpu_backend(blocks, interpret), q, k, v, q_labels, kv_labels, causal, scale)


@functools.cache
def tpu_backend(blocks: Blocks | None = None, interpret: bool = False) -> Backend:
    """The kernels, compiled for a TPU or interpreted."""
    setting = {"blocks": blocks, "interpret": interpret}
    return Backend(functools.partial(_forward, **setting), functools.partial(_backward, **setting))


def tpu_refusal(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> str | None:
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
      q_labels, kv_labels: [1, 2, B * L or B * S] segments and positions.
      active: [B, q blocks, kv blocks] bool.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    q_labels: jax.Array
    kv_labels: jax.Array
    active: jax.Array


def _cut(q, k, v, q_labels, kv_labels, causal, blocks) -> _Operands:
    q_labels = Labels(*(pad(x, blocks.q) for x in q_labels))
    kv_labels = Labels(*(pad(x, blocks.kv) for x in kv_labels))
    active = active_blocks(q_labels, kv_labels, blocks.q, blocks.kv, causal)
    # Queries that see nothing have a segment that no key has.
    q_labels = q_labels._replace(segment=jnp.where(q_labels.segment > 0, q_labels.segment, -1))
    return _Operands(
        _heads_first(q, blocks.q),
        *(_heads_first(x, blocks.kv) for x in (k, v)),
        *(jnp.stack(labels).reshape(1, 2, -1) for labels in (q_labels, kv_labels)),
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
    blocks: Blocks

    def q(self, array, axis=1) -> Operand:
        return Operand(array, self.heads, self.blocks.q, axis, inner=self.outer != "q")

    def kv(self, array) -> Operand:
        return Operand(array, self.kv_heads, self.blocks.kv, inner=self.outer != "kv")

    def labels(self, cut: _Operands) -> list[Operand]:
        q = Operand(cut.q_labels, 1, self.blocks.q, 2, inner=self.outer != "q")
        kv = Operand(cut.kv_labels, 1, self.blocks.kv, 2, inner=self.outer != "kv")
        return [q, kv] if self.outer == "q" else [kv, q]


def _view(outer: str, cut: _Operands, blocks: Blocks) -> _View:
    return _View(outer, cut.q.shape[0] // cut.k.shape[0] * blocks.heads, blocks.heads, blocks)


def _run(kernel, view: _View, cut: _Operands, more, results, scratch, *, causal, scale, interpret):
    """A kernel over its schedule; `more` are operands after those that all kernels read."""
    active = cut.active if view.outer == "q" else cut.active.swapaxes(1, 2)
    kernel = functools.partial(kernel, causal=causal, scale=scale, unroll=view.blocks.unroll)
    operands = [*view.labels(cut), view.q(cut.q), view.kv(cut.k), view.kv(cut.v), *more]
    steps = cut.k.shape[0] // view.kv_heads
    return run_schedule(kernel, schedule(active), steps, operands, results, scratch, interpret)


def _counts(q: jax.Array, k: jax.Array, blocks: Blocks) -> tuple[int, int]:
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
def _forward(q, k, v, q_labels, kv_labels, *, causal, scale, dtype, blocks, interpret):
    rows, length = q.shape[:2]
    cut = _cut(q, k, v, q_labels, kv_labels, causal, blocks)
    view = _view("q", cut, blocks)
    heads, tokens, width = cut.q.shape
    results = [
        view.q(jax.ShapeDtypeStruct(cut.q.shape, dtype)),
        view.q(jax.ShapeDtypeStruct((heads, 1, tokens), jnp.float32), axis=2),
    ]
    scratch = [(view.heads, blocks.q, channels) for channels in (LANES, LANES, width)]
    setting = {"causal": causal, "scale": scale, "interpret": interpret}
    out, log_total = _run(forward_kernel, view, cut, [], results, scratch, **setting)
    # Exactly MASKED where nothing is seen: of numbers so large every rounding shows.
    log_total = jnp.where(log_total > MASKED / 2, log_total / LOG2_E, MASKED).swapaxes(1, 2)
    log_total = _rows_first(log_total, rows, length)[..., 0]
    return _rows_first(out, rows, length), log_total


@_as_many_rows_as_fit
def _backward(q, k, v, q_labels, kv_labels, out, log_total, d_out, *, causal, scale, dtype, blocks, interpret):
    rows, length, kv_length = *q.shape[:2], k.shape[1]
    cut = _cut(q, k, v, q_labels, kv_labels, causal, blocks)
    setting = {"causal": causal, "scale": scale, "interpret": interpret}
    overlap = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1)
    log_total = log_total * LOG2_E
    log_total = jnp.where(log_total < MASKED / 2, -MASKED, log_total)  # exp2(score - log_total) is 0 without keys
    d_out = _heads_first(d_out.astype(q.dtype), blocks.q)
    log_total, overlap = (_scalars(x, blocks.q) for x in (log_total, overlap))

    def gradients(kernel, outer, of, scratch):
        view = _view(outer, cut, blocks)
        more = [view.q(d_out), view.q(log_total, axis=2), view.q(overlap, axis=2)]
        side = view.q if outer == "q" else view.kv
        results = [side(jax.ShapeDtypeStruct(x.shape, dtype)) for x in of]
        sums = [(results[0].heads, results[0].block, channels) for channels in scratch]
        return _run(kernel, view, cut, more, results, sums, **setting)

    width = cut.q.shape[2]
    [d_q] = gradients(d_q_kernel, "q", [cut.q], (LANES, LANES, width))
    d_k, d_v = gradients(d_kv_kernel, "kv", [cut.k, cut.v], (width, width))
    return _rows_first(d_q, rows, length), *(_rows_first(x, rows, kv_length) for x in (d_k, d_v))
