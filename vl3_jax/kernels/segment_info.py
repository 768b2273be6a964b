"""Which tokens of a packed row attend to which, for single tokens and for blocks of tokens."""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

Arrays = TypeVar("Arrays")  # a tree of arrays
MASKED = -1e30  # finite substitute for -inf: the difference of two of them stays finite


class SegmentInfo(NamedTuple):
    """Segments and positions of tokens, from which the attention mask follows.

    Attributes:
      segment_ids: Segment of each token, [B, length] int32; 0 = padding, which attends to nothing.
      positions: Position of each token, [B, length] int32; read by causal attention only.
    """

    segment_ids: jax.Array
    positions: jax.Array


def allowed_pairs(q_info: SegmentInfo, kv_info: SegmentInfo, causal: bool) -> jax.Array:
    """Returns which queries [..., L] attend to which keys [..., S], [..., L, S] bool."""
    allowed = q_info.segment_ids[..., :, None] == kv_info.segment_ids[..., None, :]
    allowed &= q_info.segment_ids[..., :, None] > 0
    if causal:
        allowed &= kv_info.positions[..., None, :] <= q_info.positions[..., :, None]
    return allowed


def active_blocks(q_info: SegmentInfo, kv_info: SegmentInfo, q_block: int, kv_block: int, causal: bool) -> jax.Array:
    """Finds the pairs of blocks that may hold an allowed pair of tokens.

    Each block is bounded by its smallest and largest segment. The result is exact for sorted rows and never misses a
    pair in others.

    Args:
      q_info: Segments and positions of the queries; the length is a multiple of `q_block`.
      kv_info: Segments and positions of the keys; the length is a multiple of `kv_block`.
      q_block: Tokens in a block of queries.
      kv_block: Tokens in a block of keys.
      causal: Whether a query attends only to keys at its own or earlier positions.

    Returns:
      Mask of the active pairs, [B, q blocks, kv blocks] bool.
    """
    largest = jnp.iinfo(jnp.int32).max
    q_segment, q_position = split_blocks(q_info, q_block)
    kv_segment, kv_position = split_blocks(kv_info, kv_block)
    q_first = jnp.where(q_segment > 0, q_segment, largest).min(-1)[:, :, None]
    kv_first = jnp.where(kv_segment > 0, kv_segment, largest).min(-1)[:, None, :]
    q_last, kv_last = q_segment.max(-1)[:, :, None], kv_segment.max(-1)[:, None, :]
    active = (q_first <= kv_last) & (kv_first <= q_last)
    if causal:
        # Where the only common segment is the last of the queries and the first of the keys, positions decide.
        latest_query = jnp.where(q_segment == q_last, q_position, -1).max(-1)[:, :, None]
        first_keys = kv_segment == kv_first.swapaxes(1, 2)
        earliest_key = jnp.where(first_keys, kv_position, largest).min(-1)[:, None, :]
        active &= (kv_first < q_last) | (earliest_key <= latest_query)
    return active


class BlockSchedule(NamedTuple):
    """For each block of one side, the active blocks of the other side: order[b, i, :count[b, i]].

    Attributes:
      order: Blocks of the other side, the active ones first, [B, blocks, blocks of the other side] int32.
      count: Number of active blocks, [B, blocks] int32.
    """

    order: jax.Array
    count: jax.Array


def active_block_schedule(active: jax.Array) -> BlockSchedule:
    """Lists the active blocks along the last axis of `active_blocks` (or of its transpose), in order."""
    order = jnp.argsort(~active, axis=-1, stable=True).astype(jnp.int32)
    return BlockSchedule(order, active.sum(-1, dtype=jnp.int32))


def round_up(size: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is not less than `size`."""
    return -(-size // multiple) * multiple


def pad_to_blocks(arrays: Arrays, block: int) -> Arrays:
    """Pads axis 1 of one or several arrays with zeros to a multiple of `block`."""

    def pad(x: jax.Array) -> jax.Array:
        missing = round_up(x.shape[1], block) - x.shape[1]
        return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))

    return jax.tree.map(pad, arrays)


def split_blocks(arrays: Arrays, block: int) -> Arrays:
    """Splits axis 1 of one or several arrays into blocks: [B, length, ...] -> [B, blocks, block, ...]."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, block, *x.shape[2:]), arrays)
