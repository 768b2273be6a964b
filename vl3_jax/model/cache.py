"""The key/value cache of the decoder: static arrays that carry the segment and position of every slot."""

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.model.config import TextConfig


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of S slots for each of B rows.

    The slot of a token (counted by `length`) is independent of its position in the text (`positions`). Padding is
    never written, so rows of different lengths grow side by side without holes, and a slot can be freed by setting
    its segment to 0.

    Attributes:
      keys: Keys of all layers, [layers, B, S, K, D].
      values: Values of all layers, [layers, B, S, K, D].
      segment_ids: Segment of each slot, [B, S] int32; nothing attends to a slot of segment 0.
      positions: Position of the token in each slot, [B, S] int32.
      length: Number of slots written, [B] int32. Tokens that do not fit after a row's last slot are dropped.
    """

    keys: Float[Array, "layers B S K D"]
    values: Float[Array, "layers B S K D"]
    segment_ids: Int32[Array, "B S"]
    positions: Int32[Array, "B S"]
    length: Int32[Array, " B"]

    @classmethod
    def empty(cls, config: TextConfig, rows: int, slots: int, dtype: DTypeLike = jnp.float32) -> "KVCache":
        """Creates an empty cache for `rows` rows of `slots` tokens each."""
        shape = (config.num_layers, rows, slots, config.num_kv_heads, config.head_dim)
        return cls(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            segment_ids=jnp.zeros((rows, slots), jnp.int32),
            positions=jnp.zeros((rows, slots), jnp.int32),
            length=jnp.zeros(rows, jnp.int32),
        )

    def reserve_slots(self, info: SegmentInfo) -> tuple["KVCache", Int32[Array, "B L"]]:
        """Reserves slots for the new tokens whose segment is not 0.

        Args:
          info: Segments and positions of the new tokens, [B, L].

        Returns:
          The cache with the segments and positions of the new tokens, and the slot of each token for `write_layer`,
          [B, L] int32; S for a token that is not written.
        """
        valid = info.segment_ids > 0
        slots = self.length[:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
        slots = jnp.where(valid, slots, self.segment_ids.shape[1])
        scatter = jax.vmap(lambda row, slot, new: row.at[slot].set(new, mode="drop"))
        cache = self.replace(
            segment_ids=scatter(self.segment_ids, slots, info.segment_ids),
            positions=scatter(self.positions, slots, info.positions),
            length=self.length + valid.sum(1, dtype=jnp.int32),
        )
        return cache, slots


def write_layer(
    cache: Float[Array, "layers B S K D"],
    layer: Int32[Array, ""],
    slots: Int32[Array, "B L"],
    new: Float[Array, "B L K D"],
) -> Float[Array, "layers B S K D"]:
    """Writes the new keys (or values) of one layer into the cache.

    Args:
      cache: Keys or values of all layers, [layers, B, S, K, D].
      layer: Index of the layer, [] int32.
      slots: Slots from `KVCache.reserve_slots`, [B, L] int32.
      new: New keys or values, [B, L, K, D].

    Returns:
      The updated `cache`.
    """
    rows = jnp.arange(slots.shape[0])[:, None]
    return cache.at[layer, rows, slots].set(new.astype(cache.dtype), mode="drop")
