"""Who attends to whom in a packed row, for single tokens and for whole blocks of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30  # a finite stand-in for -inf: differences of two of them stay finite


class SegmentInfo(NamedTuple):
    """What decides who attends to whom: [B, length] int32 each."""

    segment_ids: jax.Array
    positions: jax.Array


def active_blocks(q: SegmentInfo, kv: SegmentInfo, q_block: int, kv_block: int, causal: bool) -> jax.Array:
    """Which pairs of blocks may hold an allowed pair: [B, q blocks, kv blocks] bool.

    Bounds each block by its smallest and largest segment; exact for sorted rows, never too small for others. Lengths
    are whole numbers of blocks.
    """
    far = jnp.iinfo(jnp.int32).max
    q_segment, q_position = blocks(q.segment_ids, q_block), blocks(q.positions, q_block)
    kv_segment, kv_position = blocks(kv.segment_ids, kv_block), blocks(kv.positions, kv_block)
    q_first = jnp.where(q_segment > 0, q_segment, far).min(-1)[:, :, None]
    kv_first = jnp.where(kv_segment > 0, kv_segment, far).min(-1)[:, None, :]
    q_last, kv_last = q_segment.max(-1)[:, :, None], kv_segment.max(-1)[:, None, :]
    active = (q_first <= kv_last) & (kv_first <= q_last)
    if causal:
        # Where the only segment in common is the queries' last and the keys' first, positions decide.
        latest_query = jnp.where(q_segment == q_last, q_position, -1).max(-1)[:, :, None]
        first_keys = kv_segment == kv_first.swapaxes(1, 2)
        earliest_key = jnp.where(first_keys, kv_position, far).min(-1)[:, None, :]
        active &= (kv_first < q_last) | (earliest_key <= latest_query)
    return active


class BlockSchedule(NamedTuple):
    """For each block of one side the blocks of the other to visit: order[b, i, :count[b, i]]."""

    order: jax.Array  # [B, blocks, blocks of the other side] int32
    count: jax.Array  # [B, blocks] int32


def active_block_schedule(active: jax.Array) -> BlockSchedule:
    """The true entries along the last axis of `active_blocks` (or of its transpose), in order."""
    order = jnp.argsort(~active, axis=-1, stable=True).astype(jnp.int32)
    return BlockSchedule(order, active.sum(-1, dtype=jnp.int32))


def round_up(size: int, multiple: int) -> int:
    """The next whole number of `multiple`."""
    return -(-size // multiple) * multiple


def pad(x: jax.Array, block: int) -> jax.Array:
    """Fills dimension 1 with zeros up to a whole number of blocks."""
    missing = round_up(x.shape[1], block) - x.shape[1]
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))


def blocks(x: jax.Array, block: int) -> jax.Array:
    """[B, length, ...] -> [B, blocks, block, ...]."""
    return x.reshape(x.shape[0], -1, block, *x.shape[2:])
