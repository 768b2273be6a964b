"""Lookup of token embeddings, on a mesh block by block of the table.

Each device looks up its own tokens. They are sorted by where their rows lie, so that a block has few tiles of them: the
cost follows the tokens that are looked up, and nothing as large as the table exists on a device, forward or backward.

Dimension names: B rows, L positions, D width, V vocabulary.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from vl3_jax.kernels.segment_info import round_up
from vl3_jax.model.vocab_blocks import VocabBlocks
from vl3_jax.parallel.rules import current_mesh, mesh_axes, partition_spec

TABLE_AXES = ("vocab", "embed")
BLOCK, TILE = 16_384, 1024  # vocabulary rows of a block, tokens of a tile
FEW = 0.25  # tokens for each row of the table, below which it costs less to sum what each device finds in its shard


def lookup(table: jax.Array, tokens: jax.Array, dtype: DTypeLike, block: int = BLOCK, tile: int = TILE) -> jax.Array:
    """Looks up token embeddings.

    Args:
      table: Embeddings, [V, D] of any float type. Its gradient has the same type, is summed in float32, and is computed
        only if it is differentiated.
      tokens: Token ids, [B, L] int32; negative ones give zeros.
      dtype: Type of the result.
      block: Vocabulary rows that are looked up at a time, where a mesh splits both table and tokens.
      tile: Tokens that are looked up at a time.

    Returns:
      The embeddings, [B, L, D].
    """
    mesh = current_mesh()
    if mesh is not None and tokens.size >= FEW * len(table):
        spec, token_spec = _specs(table, tokens)
        token_axes = [*mesh_axes(token_spec[0]), *mesh_axes(token_spec[1])]
        blocks = VocabBlocks(0, block).on_mesh(spec, token_axes, mesh)
        if blocks.gather_axes:
            return _blockwise(table, tokens, jnp.dtype(dtype), blocks, tile)
    # Otherwise XLA may widen the table to `dtype` ahead of the loop that decodes.
    table, tokens = lax.optimization_barrier((table, tokens))
    found = jnp.take(table, tokens, axis=0, mode="clip").astype(dtype)
    return jnp.where(tokens[..., None] >= 0, found, 0)


def _specs(table: jax.Array, tokens: jax.Array) -> tuple[PartitionSpec, PartitionSpec]:
    mesh = current_mesh()
    assert mesh is not None
    return partition_spec(TABLE_AXES, table.shape, mesh), partition_spec(("batch", "length"), tokens.shape, mesh)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _blockwise(table, tokens, dtype, blocks, tile):
    spec, token_spec = _specs(table, tokens)
    run = functools.partial(_forward, dtype=dtype, blocks=blocks, tile=tile)
    return jax.shard_map(run, in_specs=(spec, token_spec), out_specs=token_spec, check_vma=False)(table, tokens)


def _blockwise_forward(table, tokens, dtype, blocks, tile):
    # Whether the table is trainable must be static in the backward pass; the pytree structure of the residuals (an
    # empty tuple or None) carries it there.
    trainable = () if table.perturbed else None
    return _blockwise(table.value, tokens.value, dtype, blocks, tile), (table.value, tokens.value, trainable)


def _blockwise_backward(dtype, blocks, tile, residuals, d_found):
    table, tokens, trainable = residuals
    if trainable is None or isinstance(d_found, jax.custom_derivatives.SymbolicZero):
        return None, None
    spec, token_spec = _specs(table, tokens)
    run = functools.partial(_backward, blocks=blocks, tile=tile)
    in_specs = (spec, token_spec, token_spec)
    return jax.shard_map(run, in_specs=in_specs, out_specs=spec, check_vma=False)(table, tokens, d_found), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward, symbolic_zeros=True)


def _forward(table, tokens, *, dtype, blocks, tile):
    """Returns the embeddings of a device's tokens, [B, L, D]."""
    order, rows, bounds = _sort(table, tokens, blocks, tile)
    size = blocks.size(table)

    def over_blocks(index, found):
        block, _ = blocks.block(table, index, dtype)

        def over_tiles(i, found):
            row, old = (lax.dynamic_slice_in_dim(x, i * tile, tile) for x in (rows - index * size, found))
            new = jnp.take(block, row, axis=0, mode="clip")
            is_own = (row >= 0) & (row < size)
            return lax.dynamic_update_slice_in_dim(found, jnp.where(is_own[:, None], new, old), i * tile, 0)

        return lax.fori_loop(*_tiles(bounds, index, tile), over_tiles, found)

    found = lax.fori_loop(0, blocks.count(table), over_blocks, jnp.zeros((len(rows), _width(table, blocks)), dtype))
    found = jnp.take(found, jnp.argsort(order), axis=0, mode="clip").reshape(*tokens.shape, -1)
    return lax.psum(found, blocks.split_axes) if blocks.split_axes else found


def _backward(table, tokens, d_found, *, blocks, tile):
    """Returns a device's shard of the table's gradient, summed over all devices' tokens."""
    order, rows, bounds = _sort(table, tokens, blocks, tile)
    size, width = blocks.size(table), d_found.shape[-1]
    d_found = jnp.take(d_found.reshape(-1, width), order, axis=0, mode="clip")
    d_found = jnp.pad(d_found, ((0, len(rows) - len(order)), (0, 0)))

    def over_blocks(index, d_table):
        def over_tiles(i, d_block):
            row, d_tile = (lax.dynamic_slice_in_dim(x, i * tile, tile) for x in (rows - index * size, d_found))
            row = jnp.where(row >= 0, row, size)
            return d_block.at[row].add(d_tile.astype(jnp.float32), mode="drop")

        d_block = jnp.zeros((size, width), jnp.float32)
        d_block = lax.fori_loop(*_tiles(bounds, index, tile), over_tiles, d_block)
        return blocks.add(d_table, index, blocks.scatter(d_block))

    return lax.fori_loop(0, blocks.count(table), over_blocks, jnp.zeros(table.shape, table.dtype))


def _width(table, blocks):
    """Returns the width of whole embeddings."""
    return table.shape[1] * math.prod(lax.axis_size(axis) for axis in blocks.width_mesh_axes)


def _sort(table, tokens, blocks, tile):
    """Sorts tokens by their rows in the blocks, those without a row last.

    Returns:
      The order of the tokens, [n] int32; the row of each, counted through all blocks, padded to whole tiles; and the
      first token of each block, [blocks + 1] int32.
    """
    index, row = blocks.places(table, tokens.reshape(-1))
    size, count = blocks.size(table), blocks.count(table)
    rows = jnp.where(index < 0, count * size, index * size + row)
    order = jnp.argsort(rows)
    padding = round_up(rows.size, tile) - rows.size
    rows = jnp.pad(rows[order], (0, padding), constant_values=count * size)
    return order, rows, jnp.searchsorted(rows, jnp.arange(count + 1) * size).astype(jnp.int32)


def _tiles(bounds, index, tile):
    """Returns the first tile of a block, and the tile after its last."""
    return bounds[index] // tile, -(-bounds[index + 1] // tile)
