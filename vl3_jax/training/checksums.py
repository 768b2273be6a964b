"""Checksums of arrays on devices, by which a run knows the frozen weights that it began from."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def checksums(arrays: Sequence[jax.Array]) -> jax.Array:
    """Computes a checksum of each array, the same on every mesh.

    Args:
      arrays: Arrays of at most 4 bytes an item.

    Returns:
      [len(arrays)] uint32: the sum over all items of their bits times an odd number that differs from item to item,
      so that each changed item and each exchange changes it.
    """
    return jnp.stack([_checksum(array) for array in arrays])


def _checksum(array: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    position, stride = jnp.zeros(array.shape, jnp.uint32), 1
    for dimension in reversed(range(array.ndim)):
        steps = lax.broadcasted_iota(jnp.uint32, array.shape, dimension)
        position += steps * jnp.uint32(stride % 2**32)
        stride *= array.shape[dimension]
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)
