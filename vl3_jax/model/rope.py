"""Rotary position embeddings, one-dimensional (decoder) and axial two-dimensional (tower).

Angles are computed in float32 whatever the model's dtype: in bfloat16 the cosine of a position below 137 is already off
by up to 0.35. A rotary table holds the cosines of the D/2 angles of each token, then their sines
(`vl3_jax.kernels.rotary`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32


def rotary_table(positions: Int32[Array, "..."], head_dim: int, theta: float) -> Float32[Array, "... head_dim"]:
    """Returns the rotary table of one-dimensional positions.

    Args:
      positions: Positions, [...] int32.
      head_dim: Channels of a head.
      theta: Base of the frequencies.

    Returns:
      Cosines, then sines, [..., head_dim] float32.
    """
    return _cosines_and_sines(positions[..., None].astype(jnp.float32) * _inverse_frequencies(head_dim, theta))


def axial_rotary_table(
    coordinates: Int32[Array, "... 2"], head_dim: int, theta: float
) -> Float32[Array, "... head_dim"]:
    """Returns the rotary table of two-dimensional positions.

    The first half of the angles depends on the row, the second on the column.

    Args:
      coordinates: Row and column in the frame's own patch grid, [..., 2] int32.
      head_dim: Channels of a head.
      theta: Base of the frequencies.

    Returns:
      Cosines, then sines, [..., head_dim] float32.
    """
    angles = coordinates[..., None].astype(jnp.float32) * _inverse_frequencies(head_dim // 2, theta)
    return _cosines_and_sines(angles.reshape(*angles.shape[:-2], head_dim // 2))


def _inverse_frequencies(dim: int, theta: float) -> jax.Array:
    """Returns theta^(-2j / dim) for j < dim / 2, [dim / 2] float32."""
    return theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def _cosines_and_sines(angles: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
