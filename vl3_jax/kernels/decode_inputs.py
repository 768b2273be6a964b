"""The operands of attention of a few queries to a cache, and what all layers share of them."""

import math
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from vl3_jax.kernels.keys_values import KeysValues
from vl3_jax.kernels.segment_info import SegmentInfo, active_block_schedule, active_blocks, allowed_pairs


class DecodeSchedule(NamedTuple):
    """Which slots the queries of each row attend to, made once for all layers.

    Attributes:
      allowed: Which queries attend to which slots, [B, L, S] int32; 0 = not.
      allowed_new: Which queries attend to which new tokens, [B, L, L] int32; 0 = not.
      order: Blocks of slots of a row, those that some query may attend to first, [B, blocks] int32.
      count: Number of these, [B] int32.
    """

    allowed: jax.Array
    allowed_new: jax.Array
    order: jax.Array
    count: jax.Array

    @property
    def block(self) -> int:
        """Slots in a block."""
        return self.allowed.shape[2] // self.order.shape[1]


def decode_schedule(q_info: SegmentInfo, kv_info: SegmentInfo, max_block: int) -> DecodeSchedule:
    """Finds the slots that queries attend to: those of the same segment, at their own or earlier positions.

    Args:
      q_info: Segments and positions of the queries, [B, L], which are those of the new tokens.
      kv_info: Segments and positions of the slots, [B, S], into which the new tokens are not yet written.
      max_block: Slots in a block at most, a power of two. More slots than these are split into blocks of the largest
        power of two that divides them.
    """
    slots = kv_info.segment_ids.shape[1]
    block = slots if slots <= max_block else math.gcd(slots, max_block)
    active = active_blocks(q_info, kv_info, q_info.segment_ids.shape[1], block, causal=True)
    order, count = active_block_schedule(active)
    allowed, allowed_new = (allowed_pairs(q_info, info, causal=True).astype(jnp.int32) for info in (kv_info, q_info))
    return DecodeSchedule(allowed, allowed_new, order[:, 0], count[:, 0])


class DecodeInputs(flax.struct.PyTreeNode):
    """The operands of attention of a few new tokens to themselves and to one layer of a cache.

    The new tokens are not yet written: while the layers run, the cache is only read.

    Attributes:
      q: Queries, [B, L, H, D].
      k: Keys of the new tokens, [B, L, K, D].
      v: Values of the new tokens, likewise.
      rotary: Rotary table by which `q` and `k` are rotated before, [B, L, D] float32.
      keys_values: Cached keys and values of all layers.
      layer: Index of the layer, [] int32.
      rows: Row of the cache of each row of queries, [B] int32; None where they are the same.
      schedule: Which slots and new tokens the queries attend to.
      scale: Factor of the scores.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    rotary: jax.Array
    keys_values: KeysValues
    layer: jax.Array
    rows: jax.Array | None
    schedule: DecodeSchedule
    scale: float = flax.struct.field(pytree_node=False, kw_only=True)
