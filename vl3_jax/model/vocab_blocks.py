"""Blocks of a matrix over the vocabulary: one at a time whole on every device, its gradient summed and scattered back.

Embedding and output head have a row for each of some 150,000 tokens, split over a mesh. Neither is ever whole on a
device: loops go over blocks. A mesh axis that splits both tokens and vocabulary (fsdp) gathers one block at a time and
scatters the gradient of the block. An axis that splits the vocabulary alone (tensor) keeps its shard.

The functions are called inside a `shard_map` on a device's shards, or without a mesh on the whole arrays.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec

from vl3_jax.parallel.rules import mesh_axes
from vl3_jax.parallel.scatter import psum_scatter


@dataclasses.dataclass(frozen=True)
class VocabBlocks:
    """How one device sees the matrix, and the size of a block.

    Attributes:
      axis: Dimension of the matrix that is the vocabulary, 0 or 1.
      rows: Largest number of vocabulary rows of a block.
      vocab_mesh_axes: Mesh axes that split the vocabulary, major first.
      gather_axes: Those of `vocab_mesh_axes` that also split the tokens, its minor ones; blocks are gathered over them.
      width_mesh_axes: Mesh axes that split the other dimension; blocks are always gathered over them.
      sum_axes: Further mesh axes that split the tokens.
      copies: Number of devices along `width_mesh_axes` that hold the same tokens.
    """

    axis: int
    rows: int
    vocab_mesh_axes: tuple[str, ...] = ()
    gather_axes: tuple[str, ...] = ()
    width_mesh_axes: tuple[str, ...] = ()
    sum_axes: tuple[str, ...] = ()
    copies: int = 1

    def on_mesh(self, spec: PartitionSpec, token_axes: Sequence[str], mesh: AbstractMesh) -> "VocabBlocks":
        """Returns the blocks of a matrix with this partition spec, where `token_axes` split the tokens."""
        vocab_axes, width_axes = mesh_axes(spec[self.axis]), mesh_axes(spec[1 - self.axis])
        return dataclasses.replace(
            self,
            vocab_mesh_axes=vocab_axes,
            gather_axes=tuple(axis for axis in vocab_axes if axis in token_axes),
            width_mesh_axes=width_axes,
            sum_axes=tuple(axis for axis in token_axes if axis not in vocab_axes + width_axes),
            copies=math.prod(mesh.shape[axis] for axis in width_axes if axis not in token_axes),
        )

    @property
    def split_axes(self) -> tuple[str, ...]:
        """Mesh axes over which the vocabulary stays split."""
        return tuple(axis for axis in self.vocab_mesh_axes if axis not in self.gather_axes)

    @property
    def gathered(self) -> int:
        """Number of devices that a block is gathered from."""
        return math.prod(lax.axis_size(axis) for axis in self.gather_axes)

    def own_rows(self, matrix: jax.Array) -> int:
        """Returns the number of vocabulary rows that this device contributes to a block."""
        return min(max(self.rows // self.gathered, 1), matrix.shape[self.axis])

    def size(self, matrix: jax.Array) -> int:
        """Returns the number of vocabulary rows of a block."""
        return self.own_rows(matrix) * self.gathered

    def count(self, matrix: jax.Array) -> int:
        """Returns the number of blocks."""
        return -(-matrix.shape[self.axis] // self.own_rows(matrix))

    def block(self, matrix: jax.Array, index: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
        """Returns a block in `dtype`, [v, D] or [D, v], and its token ids, [v] int32; -1 for repeated rows."""
        rows, start = self.own_rows(matrix), self._start(matrix, index)
        block = lax.dynamic_slice_in_dim(matrix, start, rows, self.axis).astype(dtype)
        local_ids = start + jnp.arange(rows)
        shard = lax.axis_index(self.vocab_mesh_axes) if self.vocab_mesh_axes else 0
        ids = jnp.where(local_ids >= index * rows, local_ids + shard * matrix.shape[self.axis], -1)
        if self.width_mesh_axes:
            block = lax.all_gather(block, self.width_mesh_axes, axis=1 - self.axis, tiled=True)
        if self.gather_axes:
            block = lax.all_gather(block, self.gather_axes, axis=self.axis, tiled=True)
            ids = lax.all_gather(ids, self.gather_axes, tiled=True)
        return block, ids

    def places(self, matrix: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the block and the row in it of each token id, int32; the block of an id that this device lacks is -1.

        The rows of negative ids are those of no block.
        """
        size, rows = matrix.shape[self.axis], self.own_rows(matrix)
        shard, local = ids // size, ids % size
        index = local // rows
        row = shard % self.gathered * rows + local - self._start(matrix, index)
        own_shard = lax.axis_index(self.split_axes) if self.split_axes else 0
        return jnp.where((ids >= 0) & (shard // self.gathered == own_shard), index, -1), row

    def scatter(self, d_block: jax.Array) -> jax.Array:
        """Sums a block's gradient over the tokens of all devices and returns this device's shard of it."""
        if self.sum_axes:
            d_block = lax.psum(d_block, self.sum_axes)
        for axis in self.gather_axes:
            d_block = psum_scatter(d_block, axis, self.axis)
        for axis in self.width_mesh_axes:
            d_block = psum_scatter(d_block, axis, 1 - self.axis)
        return d_block / self.copies if self.copies > 1 else d_block

    def add(self, d_matrix: jax.Array, index: jax.Array, d_block: jax.Array) -> jax.Array:
        """Adds the gradient of a block; it is 0 in the rows that repeat those of the block before."""
        start = self._start(d_matrix, index)
        old = lax.dynamic_slice_in_dim(d_matrix, start, d_block.shape[self.axis], self.axis)
        new = (old.astype(jnp.float32) + d_block).astype(d_matrix.dtype)
        return lax.dynamic_update_slice_in_dim(d_matrix, new, start, self.axis)

    def _start(self, matrix: jax.Array, index: jax.Array) -> jax.Array:
        """Returns the first row of a block; the last block starts early and repeats rows of the block before."""
        rows = self.own_rows(matrix)
        return jnp.minimum(index * rows, matrix.shape[self.axis] - rows)
