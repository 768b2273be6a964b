"""The pairs of blocks that a TPU kernel visits, one after another, and the call that visits them and no others.

The grid of a kernel is steps over heads by visits, and how many visits there are is known when the program runs, not
when it is compiled: a pair of blocks that cannot hold an allowed pair of tokens costs no step, no copy and no
arithmetic. The visits of one outer block follow each other, so what is gathered for it stays in VMEM; the copies for
the next visit run during the present one, also from one outer block to the next.

Arrays are [heads, rows * length, channels], all rows one after another, and blocks are numbered along that axis.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Of a block's number; the sign stays free.
_OUTER_BITS, _INNER_BITS = 15, 16
# int32 numbers in SMEM, which has 1 MiB from v4 on; the rest is left to the compiler.
_SMEM_NUMBERS = 131_072


class PairSchedule(NamedTuple):
    """pairs[:count] are the visits, ordered by outer block; every outer block has one at least."""

    pairs: jax.Array  # [pairs there could be + 1] int32: number of the outer block, _INNER_BITS of the inner one's
    count: jax.Array  # [] int32


def pair_schedule(active: jax.Array) -> PairSchedule:
    """Visits of the true entries of [B, outer blocks, inner blocks] bool.

    An outer block without any visits some inner block all the same, for its result has to be written.
    """
    _, outer_count, inner_count = active.shape
    idle = ~active.any(-1, keepdims=True)
    active = (active | (idle & (jnp.arange(inner_count) == 0))).ravel()
    count = active.sum(dtype=jnp.int32)
    chosen = jnp.argsort(~active, stable=True).astype(jnp.int32)
    outer = chosen // inner_count
    inner = outer // outer_count * inner_count + chosen % inner_count
    pairs = jnp.where(jnp.arange(chosen.size) < count, outer << _INNER_BITS | inner, -1)
    return PairSchedule(jnp.pad(pairs, (0, 1), constant_values=-1), count)


def fits_schedule(rows: int, outer_count: int, inner_count: int) -> bool:
    """Whether `schedule` of [rows, outer_count, inner_count], or of its transpose, can be kept in SMEM."""
    most = rows * max(outer_count, inner_count)
    return most < 2**_OUTER_BITS and rows * outer_count * inner_count < _SMEM_NUMBERS


def _outer(pairs, visit):
    return pairs[visit] >> _INNER_BITS


def _inner(pairs, visit):
    return pairs[visit] & ((1 << _INNER_BITS) - 1)


def is_first(pairs) -> jax.Array:
    """In a kernel: whether this is the first visit of its outer block."""
    visit = pl.program_id(1)
    return (visit == 0) | (_outer(pairs, visit) != _outer(pairs, jnp.maximum(visit - 1, 0)))


def is_last(pairs) -> jax.Array:
    """In a kernel: whether this is the last visit of its outer block."""
    visit = pl.program_id(1)
    return _outer(pairs, visit) != _outer(pairs, visit + 1)


class Operand(NamedTuple):
    """An array of three dimensions, heads first, and the part of it that one visit sees.

    Attributes:
      array: or the shape of a result.
      heads: of one step; a step takes the next so many, or all steps the same where these are all there are.
      block: tokens.
      axis: 1 or 2, the one of tokens.
      inner: blocks are those of the inner side.
    """

    array: jax.Array | jax.ShapeDtypeStruct
    heads: int
    block: int
    axis: int = 1
    inner: bool = False

    def spec(self) -> pl.BlockSpec:
        """Block shape and index map over (step, visit)."""
        shape = [self.heads, *self.array.shape[1:]]
        shape[self.axis] = self.block
        number = _inner if self.inner else _outer
        one_step = self.heads == self.array.shape[0]

        def index(step, visit, pairs):
            at = [0 if one_step else step, 0, 0]
            at[self.axis] = number(pairs, visit)
            return tuple(at)

        return pl.BlockSpec(tuple(shape), index)


def run_schedule(
    kernel: Callable[..., None],
    plan: PairSchedule,
    steps: int,
    operands: Sequence[Operand],
    results: Sequence[Operand],
    scratch: Sequence[tuple[int, ...]],
    interpret: bool,
) -> list[jax.Array]:
    """Runs `kernel(pairs, *operands, *results, *scratch)`, all of them references, for every step and visit.

    Args:
      kernel: writes results at the last visit of an outer block at the latest.
      plan: from `schedule`.
      steps: over heads; they may run on several cores.
      operands: inputs.
      results: outputs, blocks of the outer side.
      scratch: shapes of float32 arrays in VMEM that live from visit to visit.
      interpret: runs on any device, slowly.
    """
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(steps, plan.count),
            in_specs=[one.spec() for one in operands],
            out_specs=[one.spec() for one in results],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[one.array for one in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=kernel.func.__name__,
    )(plan.pairs, *[one.array for one in operands])
