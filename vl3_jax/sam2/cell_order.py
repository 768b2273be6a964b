"""Maps as lists of their cells, square by square, and squares within squares.

Dimension names: B images, H and W rows and columns of a map, N cells of a map, C channels.
"""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Map = Float[Array, "B H W C"]
Cells = Float[Array, "B N C"]
Groups = tuple[int, ...]


def cells_of(x: Map, groups: Groups) -> Cells:
    """Lists the cells of square maps, square by square.

    Args:
      x: Maps, which are padded with zeros below and on the right where squares do not tile them.
      groups: Rows, and columns, of the squares; of those within each of them, by which its cells are listed; and so on.
    """
    batch, side, _, channels = x.shape
    counts = _counts(side, groups)
    missing = math.prod(counts) - side
    x = jnp.pad(x, [(0, 0), (0, missing), (0, missing), (0, 0)])
    axes = 1 + np.arange(2 * len(counts)).reshape(2, -1)  # rows, and columns
    x = x.reshape(batch, *counts, *counts, channels).transpose(0, *axes.T.flat, 2 * len(counts) + 1)
    return x.reshape(batch, -1, channels)


def map_of(x: Cells, side: int, groups: Groups) -> Map:
    """Inverts `cells_of` for maps of `side` rows and columns."""
    batch, _, channels = x.shape
    counts = _counts(side, groups)
    axes = 1 + np.arange(2 * len(counts)).reshape(-1, 2)
    x = x.reshape(batch, *np.repeat(counts, 2), channels).transpose(0, *axes.T.flat, 2 * len(counts) + 1)
    return x.reshape(batch, math.prod(counts), math.prod(counts), channels)[:, :side, :side]


def _counts(side: int, groups: Groups) -> list[int]:
    """Returns how many squares are side by side in a map, in each of them, and so on; the last ones are cells."""
    return [-(-side // groups[0]), *(outer // inner for outer, inner in zip(groups, (*groups[1:], 1), strict=True))]


def max_pool(x: Cells, group: int) -> Cells:
    """Returns the largest value in each 2 x 2 cells, which come in the order of squares of `group` rows and columns."""
    batch, count, channels = x.shape
    squares = x.reshape(-1, group, group, channels)
    return nn.max_pool(squares, (2, 2), (2, 2)).reshape(batch, count // 4, channels)
