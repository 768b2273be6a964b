"""Position encodings of SAM-2: sines over a map, sines of distances in time, and random Fourier features."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vl3_jax.kernels.einsum import einsum

_TEMPERATURE = 10_000.0


def sine_grid(side: int, channels: int) -> Float[np.ndarray, "side side channels"]:
    """Returns the sine encoding of each cell of a square map, rows in the first half of the channels.

    Within a half, sines and cosines alternate.
    """
    half = channels // 2
    angles = 2 * np.pi * np.arange(1, side + 1) / (side + 1e-6)
    angles = angles[:, None] / _TEMPERATURE ** (2 * (np.arange(half) // 2) / half)
    axis = np.where(np.arange(half) % 2 == 0, np.sin(angles), np.cos(angles)).astype(np.float32)
    rows, columns = np.broadcast_to(axis[:, None], (side, side, half)), np.broadcast_to(axis, (side, side, half))
    return np.concatenate([rows, columns], axis=-1)


def sine_distances(distances: Float[Array, "..."], channels: int) -> Float[Array, "... channels"]:
    """Returns the sine encoding of distances in time: all sines, then all cosines."""
    half = channels // 2
    angles = distances[..., None] / _TEMPERATURE ** (2 * (np.arange(half) // 2) / half)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def fourier_features(points: Float[Array, "... 2"], frequencies: Float[Array, "2 F"]) -> Float[Array, "... 2F"]:
    """Returns the Fourier features of points.

    Args:
      points: Column and row as shares of the image's width and height, [..., 2] in 0..1.
      frequencies: Random frequencies, [2, F].

    Returns:
      All sines, then all cosines, [..., 2 * F].
    """
    angles = 2 * jnp.pi * einsum("...i,if->...f", 2 * points - 1, frequencies)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def cell_centres(side: int) -> Float[np.ndarray, "side side 2"]:
    """Returns column and row of the centre of each cell of a square map, in 0..1."""
    centres = ((np.arange(side) + 0.5) / side).astype(np.float32)
    return np.stack(np.meshgrid(centres, centres), axis=-1)


def cell_coordinates(side: int) -> np.ndarray:
    """Returns column and row of each cell of a square map in raster order, [side * side, 2] int32."""
    return np.stack(np.meshgrid(*[np.arange(side)] * 2), axis=-1).reshape(-1, 2).astype(np.int32)


def as_array(encoding: np.ndarray, dtype) -> jax.Array:
    """Returns an encoding as a constant of a program, in the dtype of its activations."""
    return jnp.asarray(encoding, dtype)
