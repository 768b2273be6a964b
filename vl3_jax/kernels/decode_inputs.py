"""The operands of attention of a few queries to a cache, and what all layers share of them."""

import math
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from vl3_jax.kernels.keys_values import KeysValues
from vl3_jax.kernels.rotary import rotate
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
      qkv: What a token brings, side by side, [B, L, K * (G + 2) * D]: for each key/value head the G queries of its
        group, its key and its value.
      rotary: Rotary table by which queries and keys are rotated before, [B, L, D] float32.
      keys_values: Cached keys and values of all layers.
      layer: Index of the layer, [] int32.
      rows: Row of the cache of each row of queries, [B] int32; None where they are the same.
      schedule: Which slots and new tokens the queries attend to.
      scale: Factor of the scores.
    """

    qkv: jax.Array
    rotary: jax.Array
    keys_values: KeysValues
    layer: jax.Array
    rows: jax.Array | None
    schedule: DecodeSchedule
    scale: float = flax.struct.field(pytree_node=False, kw_only=True)

    @property
    def group(self) -> int:
        """Queries of a group, G."""
        _, _, kv_heads, _, width = self.keys_values.keys.shape
        return self.qkv.shape[2] // (kv_heads * width) - 2

    def rotated(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns rotated queries [B, L, K * G, D] and keys, and values, [B, L, K, D] each."""
        _, _, kv_heads, _, width = self.keys_values.keys.shape
        q, k, v = split_heads(self.qkv, kv_heads, self.group, width)
        return rotate(q, self.rotary), rotate(k, self.rotary), v


def split_heads(qkv: jax.Array, kv_heads: int, group: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Splits what `join_heads` joined.

    Args:
      qkv: Queries, keys and values side by side, [..., K * (G + 2) * D].
      kv_heads: Key/value heads, K.
      group: Queries of a group, G.
      width: Channels of a head, D.

    Returns:
      Queries [..., K * G, D], and keys and values, [..., K, D] each.
    """
    lead = qkv.shape[:-1]
    parts = qkv.reshape(*lead, kv_heads, group + 2, width)
    q = parts[..., :group, :].reshape(*lead, kv_heads * group, width)
    return q, parts[..., group, :], parts[..., group + 1, :]


def join_heads(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Joins queries [..., K * G, D], keys and values [..., K, D] to [..., K * (G + 2) * D]."""
    grouped_q = q.reshape(*k.shape[:-1], -1, k.shape[-1])
    joined = jnp.concatenate([grouped_q, k[..., None, :], v[..., None, :]], axis=-2)
    return joined.reshape(*k.shape[:-2], -1)


def flat(*parts: jax.Array) -> jax.Array:
    """Puts the parts of each head side by side, and the heads: n of [..., heads, D] -> [..., heads * n * D]."""
    joined = jnp.stack(parts, axis=-2)
    return joined.reshape(*parts[0].shape[:-2], -1)


class DecodeOutputs(NamedTuple):
    """The results of attention of a few new tokens, heads side by side.

    Attributes:
      out: The attention output, [B, L, K * G * D] in the dtype of `qkv`.
      new: For each key/value head the rotated key of a new token and its value, [B, L, K * 2 * D].
    """

    out: jax.Array
    new: jax.Array
