"""Schedules of block pairs for the TPU kernels, and the Pallas call that processes exactly these pairs.

The grid of a kernel is (head groups, block pairs). The number of pairs is known only when the program runs, so a pair
of blocks that cannot hold an allowed pair of tokens costs no grid step, no copy and no arithmetic. The pairs of one
outer block follow each other, so its accumulators stay in VMEM. The copies for the next pair run while the current one
is processed, also across a change of the outer block.

Arrays are [heads, rows * length, channels], with all rows concatenated, and blocks are numbered along that axis.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Bits of the block numbers in a packed pair; the sign bit stays free.
_OUTER_BITS, _INNER_BITS = 15, 16
# Limit of int32 numbers in SMEM, which has 1 MiB from v4 on; the rest is left to the compiler.
_MAX_PAIRS = 131_072


class PairSchedule(NamedTuple):
    """Block pairs in the order in which a kernel processes them: pairs[:count].

    Pairs are sorted by outer block, and every outer block has at least one.

    Attributes:
      pairs: Packed pairs, [possible pairs + 1] int32: the outer block's number shifted by `_INNER_BITS`, and the inner
        block's number. Entries from `count` on are -1.
      count: Number of pairs, [] int32.
    """

    pairs: jax.Array
    count: jax.Array


def pair_schedule(active: jax.Array) -> PairSchedule:
    """Lists the active block pairs.

    An outer block without active pairs is paired with one inner block all the same, because its result must be written.

    Args:
      active: Mask of the active pairs, [B, outer blocks, inner blocks] bool.

    Returns:
      The schedule over all rows.
    """
    _, outer_count, inner_count = active.shape
    idle = ~active.any(-1, keepdims=True)
    active = (active | (idle & (jnp.arange(inner_count) == 0))).ravel()
    count = active.sum(dtype=jnp.int32)
    indices = jnp.argsort(~active, stable=True).astype(jnp.int32)
    outer = indices // inner_count
    inner = outer // outer_count * inner_count + indices % inner_count
    pairs = jnp.where(jnp.arange(indices.size) < count, outer << _INNER_BITS | inner, -1)
    return PairSchedule(jnp.pad(pairs, (0, 1), constant_values=-1), count)


def fits_schedule(rows: int, outer_count: int, inner_count: int) -> bool:
    """Returns whether the schedule of [rows, outer_count, inner_count] pairs, or of the transpose, fits SMEM."""
    max_blocks = rows * max(outer_count, inner_count)
    return max_blocks < 2**_OUTER_BITS and rows * outer_count * inner_count < _MAX_PAIRS


def _outer_block(pairs, index):
    return pairs[index] >> _INNER_BITS


def _inner_block(pairs, index):
    return pairs[index] & ((1 << _INNER_BITS) - 1)


def is_first(pairs) -> jax.Array:
    """Returns, inside a kernel, whether this is the first pair of its outer block."""
    index = pl.program_id(1)
    return (index == 0) | (_outer_block(pairs, index) != _outer_block(pairs, jnp.maximum(index - 1, 0)))


def is_last(pairs) -> jax.Array:
    """Returns, inside a kernel, whether this is the last pair of its outer block."""
    index = pl.program_id(1)
    return _outer_block(pairs, index) != _outer_block(pairs, index + 1)


class Operand(NamedTuple):
    """A three-dimensional array, heads first, and the block of it that one grid step reads or writes.

    Attributes:
      array: The array, or shape and dtype of a result.
      heads: Heads in a block. If these are all heads of the array, every head group gets the same ones; otherwise head
        group i gets the i-th `heads` heads.
      block: Tokens in a block.
      side: Side whose tokens these are, "q" or "kv".
      axis: Axis of the tokens, 1 or 2.
    """

    array: jax.Array | jax.ShapeDtypeStruct
    heads: int
    block: int
    side: str
    axis: int = 1

    def spec(self, outer: str) -> pl.BlockSpec:
        """Returns the block shape and the index map over (head group, pair) of a kernel whose outer side is `outer`."""
        shape = [self.heads, *self.array.shape[1:]]
        shape[self.axis] = self.block
        block_number = _outer_block if self.side == outer else _inner_block
        all_heads = self.heads == self.array.shape[0]

        def index_map(head_group, pair, pairs):
            indices = [0 if all_heads else head_group, 0, 0]
            indices[self.axis] = block_number(pairs, pair)
            return tuple(indices)

        return pl.BlockSpec(tuple(shape), index_map)


def run_schedule(
    kernel: functools.partial[None],
    active: jax.Array,
    operands: Sequence[Operand],
    results: Sequence[Operand],
    scratch_widths: Sequence[int],
    interpret: bool,
) -> list[jax.Array]:
    """Runs `kernel(pairs, *operands, *results, *scratch)`, all of them references, for every head group and pair.

    Args:
      kernel: Kernel, which writes its results at the last pair of an outer block at the latest.
      active: Mask of the active block pairs, [B, q blocks, kv blocks] bool.
      operands: Inputs.
      results: Outputs, in blocks of the outer side. Their head groups may run on several cores.
      scratch_widths: Channels of float32 arrays in VMEM that are kept from pair to pair. They have the heads and tokens
        of a block of the results.
      interpret: Whether to interpret the kernel, which works on any device but is slow.

    Returns:
      The outputs.
    """
    array, heads, block, outer, _ = results[0]
    schedule = pair_schedule(active if outer == "q" else active.swapaxes(1, 2))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(array.shape[0] // heads, schedule.count),
            in_specs=[operand.spec(outer) for operand in operands],
            out_specs=[result.spec(outer) for result in results],
            scratch_shapes=[pltpu.VMEM((heads, block, width), jnp.float32) for width in scratch_widths],
        ),
        out_shape=[result.array for result in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=kernel.func.__name__,
    )(schedule.pairs, *[operand.array for operand in operands])
