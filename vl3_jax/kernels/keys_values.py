"""Cached keys and values, heads first, which are written in place and read by the decode kernels in place."""

import flax.struct
import jax
import jax.numpy as jnp

_LARGEST = 127  # of int8


class KeysValues(flax.struct.PyTreeNode):
    """Cached keys and values of several layers, or of one.

    Dimension names: R rows of the cache, S slots, K key/value heads, D channels of a head; B rows of tokens, L tokens.

    Attributes:
      keys: Keys, [layers, R, K, S, D] of a float type or int8.
      values: Values, likewise.
      key_scales: By what int8 keys are multiplied, [layers, R, K, S] float32; None of a float type.
      value_scales: By what int8 values are multiplied, likewise.
    """

    keys: jax.Array
    values: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None

    def write(
        self, layer: jax.Array, rows: jax.Array | None, slots: jax.Array, keys: jax.Array, values: jax.Array
    ) -> "KeysValues":
        """Writes the keys and values of new tokens into one layer.

        Args:
          layer: Index of the layer, [] int32.
          rows: Row of the cache of each row of tokens, [B] int32; None where they are the same.
          slots: Slot of each token, [B, L] int32; a token whose slot is S or more is dropped.
          keys: New keys, [B, L, K, D].
          values: New values, [B, L, K, D].
        """
        index = (layer, row_numbers(rows, slots)[:, None], slice(None), slots)

        def put(cached: jax.Array, new: jax.Array) -> jax.Array:
            return cached.at[index].set(new.astype(cached.dtype), mode="drop")

        if self.key_scales is None or self.value_scales is None:
            return self.replace(keys=put(self.keys, keys), values=put(self.values, values))
        (keys, key_scales), (values, value_scales) = _quantize(keys), _quantize(values)
        return KeysValues(
            keys=put(self.keys, keys),
            values=put(self.values, values),
            key_scales=put(self.key_scales, key_scales),
            value_scales=put(self.value_scales, value_scales),
        )

    def read(self, layer: jax.Array, rows: jax.Array | None, dtype) -> tuple[jax.Array, jax.Array]:
        """Returns the keys and values of one layer, [B, K, S, D] each, in `dtype`."""

        def get(cached: jax.Array, scales: jax.Array | None) -> jax.Array:
            part = _row_parts(cached, layer, rows)
            if scales is not None:
                part = part.astype(jnp.float32) * _row_parts(scales, layer, rows)[..., None]
            return part.astype(dtype)

        return get(self.keys, self.key_scales), get(self.values, self.value_scales)


def row_numbers(rows: jax.Array | None, like: jax.Array) -> jax.Array:
    """Returns `rows`, or the number of each row of `like`, [B] int32, for None."""
    return jnp.arange(like.shape[0], dtype=jnp.int32) if rows is None else rows


def _row_parts(cached: jax.Array, layer: jax.Array, rows: jax.Array | None) -> jax.Array:
    part = jax.lax.dynamic_index_in_dim(cached, layer, keepdims=False)
    return part if rows is None else part[rows]


def _quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns int8 values and the scale of each token and head, [..., D] -> [..., D] and [...]."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(-1) / _LARGEST
    return jnp.round(x / jnp.where(scale == 0, 1, scale)[..., None]).astype(jnp.int8), scale
