"""Sums over the chips of a mesh axis whose parts stay scattered over them."""

import math

import jax
import numpy as np
from jax import lax

# From this many chips on, the TPU compiler makes a sum of whole arrays of a scatter over one group.
_LARGE_GROUP = 16


def stages(size: int) -> tuple[int, ...]:
    """Splits an axis into the groups that a sum passes through, one after another; the major ones first.

    A TPU mesh is arranged so that these are axes of the torus, or parts of them (`vl3_jax.parallel.mesh`).
    """
    if size < _LARGE_GROUP:
        return (size,)
    minor = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    return (size // minor, minor) if minor > 1 else (size,)


def psum_scatter(x: jax.Array, axis: str, dimension: int) -> jax.Array:
    """Sums an array over a mesh axis and leaves each chip its part; to be called inside a `shard_map`.

    Args:
      x: Array of which each chip along the axis has one.
      axis: Mesh axis.
      dimension: Dimension of `x` that is split over the axis.

    Returns:
      The sum, of which each chip has the part that a partition spec gives it.
    """
    count = lax.axis_size(axis)
    sizes, shape = stages(count), x.shape
    before, after = shape[:dimension], shape[dimension + 1 :]
    # Parts have a dimension of their own: within one, the compiler would sum whole arrays unless they are whole tiles.
    x = x.reshape(*before, count, *([-1] if shape[dimension] > count else []), *after)
    chips = np.arange(count).reshape(sizes)
    for stage, size in enumerate(sizes):
        groups = np.moveaxis(chips, stage, -1).reshape(-1, size).tolist() if len(sizes) > 1 else None
        x = lax.psum_scatter(x, axis, scatter_dimension=dimension, axis_index_groups=groups, tiled=True)
    return x.reshape(*before, -1, *after)
