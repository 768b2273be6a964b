"""The key/value cache of the decoder: a static array that says for itself what lies where."""

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vl3_jax.model.config import TextConfig


@flax.struct.dataclass
class KVCache:
    """Keys and values of S slots for each of B rows.

    Where a token is written (`length`) is apart from where it stands in the text (`positions`): padding is never
    written, so rows of different lengths grow side by side without holes, and a slot may be given up by setting
    its segment to 0.

    Attributes:
      keys, values: [layers, B, S, K, D].
      segment_ids: [B, S] int32, 0 = nothing to attend to.
      positions: [B, S] int32.
      length: [B] int32, slots written so far. A row past its last slot drops what no longer fits.
    """

    keys: jax.Array
    values: jax.Array
    segment_ids: jax.Array
    positions: jax.Array
    length: jax.Array

    @classmethod
    def empty(cls, config: TextConfig, rows: int, slots: int, dtype: DTypeLike = jnp.float32) -> "KVCache":
        """A cache for `rows` rows of `slots` tokens each, nothing written."""
        shape = (config.num_layers, rows, slots, config.num_kv_heads, config.head_dim)
        return cls(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            segment_ids=jnp.zeros((rows, slots), jnp.int32),
            positions=jnp.zeros((rows, slots), jnp.int32),
            length=jnp.zeros(rows, jnp.int32),
        )

    def append_labels(self, segment_ids: jax.Array, positions: jax.Array) -> tuple["KVCache", jax.Array]:
        """Claims slots for the tokens whose segment is not 0.

        Args:
          segment_ids, positions: [B, L] int32 of the new tokens.

        Returns:
          The cache with their labels written, and slots [B, L] int32 for `write`; S where nothing is written.
        """
        real = segment_ids > 0
        slots = self.length[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
        slots = jnp.where(real, slots, self.segment_ids.shape[1])
        put = jax.vmap(lambda row, slot, new: row.at[slot].set(new, mode="drop"))
        cache = self.replace(
            segment_ids=put(self.segment_ids, slots, segment_ids),
            positions=put(self.positions, slots, positions),
            length=self.length + real.sum(1, dtype=jnp.int32),
        )
        return cache, slots


def write(layers: jax.Array, layer: jax.Array, slots: jax.Array, new: jax.Array) -> jax.Array:
    """Writes one layer's new keys (or values) in place.

    Args:
      layers: [layers, B, S, K, D]; layer: [] int32; slots: [B, L] from `append_labels`; new: [B, L, K, D].
    """
    rows = jnp.arange(slots.shape[0])[:, None]
    return layers.at[layer, rows, slots].set(new.astype(layers.dtype), mode="drop")
