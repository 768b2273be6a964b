"""Cached keys and values, heads first, which are written in place and read by the decode kernels in place."""

import flax.struct
import jax
import jax.numpy as jnp

from vl3_jax.parallel.rules import row_major

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
        self, rows: jax.Array | None, slots: jax.Array, new: jax.Array, first_row: jax.Array | int = 0
    ) -> "KeysValues":
        """Writes the keys and values of new tokens into all layers, in place where the caller donates them.

        Args:
          rows: Row of the cache of each row of tokens, [B] int32; None where they are the same.
          slots: Slot of each token, [B, L] int32; those of a row follow one another, and a token whose slot is S is
            dropped.
          new: Key and value of each head of the new tokens, [layers, B, L, K * 2 * D].
          first_row: Number of the first row of this cache, where it is a part of a larger one; tokens of rows that are
            not in it are dropped.
        """
        parts = new.reshape(*new.shape[:-1], -1, 2, self.keys.shape[4]).swapaxes(2, 3)
        fresh_arrays = [parts[..., 0, :], parts[..., 1, :]]
        if self.key_scales is not None:
            fresh_arrays, scales = zip(*(_quantize(x) for x in fresh_arrays), strict=True)
            fresh_arrays = [*fresh_arrays, *scales]
        arrays, structure = jax.tree.flatten(self)
        count, size = self.keys.shape[1], self.keys.shape[3]
        width = min(slots.shape[1], size)
        first = slots.min(1)
        if rows is not None:
            rows = rows - first_row
            first = jnp.where((rows >= 0) & (rows < count), first, size)
        start = jnp.minimum(first, size - width)
        is_token = slots[:, None, :] == start[:, None, None] + jnp.arange(width)[:, None]
        token, is_new = jnp.argmax(is_token, axis=-1), is_token.any(-1) & (first < size)[:, None]

        def write_row(b: jax.Array, arrays: list[jax.Array]) -> list[jax.Array]:
            written, begin = [], first[b]
            for cached, fresh in zip(arrays, fresh_arrays, strict=True):
                at = (0, b if rows is None else rows[b], 0, jnp.minimum(begin, size - width), 0)[: cached.ndim]
                window = (cached.shape[0], 1, cached.shape[2], width, *cached.shape[4:])
                row = jax.lax.dynamic_index_in_dim(fresh, b, 1)
                if slots.shape[1] == 1:
                    is_written = begin < size
                else:
                    row = jnp.take(row, token[b], axis=3)
                    is_written = is_new[b].reshape(-1, *[1] * (cached.ndim - 4))
                merged = jnp.where(is_written, row.astype(cached.dtype), jax.lax.dynamic_slice(cached, at, window))
                written.append(row_major(jax.lax.dynamic_update_slice(cached, merged, at)))
            return written

        return jax.tree.unflatten(structure, jax.lax.fori_loop(0, len(slots), write_row, arrays))

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
