"""Rotary position embeddings, one-dimensional (decoder) and axial two-dimensional (tower).

Angles are computed in float32 whatever the model's type: in bfloat16 the cosine of a position below 137 is
already off by up to 0.35. Both use the half-split pairing: channel i turns with channel i + D/2.
"""

import jax
import jax.numpy as jnp


def _inverse_frequencies(dim: int, theta: float) -> jax.Array:
    """[dim / 2] float32: theta^(-2j / dim)."""
    return theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> jax.Array:
    """Angles of one-dimensional positions.

    Args:
      positions: [...] int32.

    Returns:
      [..., head_dim / 2] float32.
    """
    return positions[..., None].astype(jnp.float32) * _inverse_frequencies(head_dim, theta)


def axial_rotary_angles(coordinates: jax.Array, head_dim: int, theta: float) -> jax.Array:
    """Angles of (row, column) positions: one half of the angles follows the row, the other the column.

    Args:
      coordinates: [..., 2] int32, row and column in the frame's own patch grid.

    Returns:
      [..., head_dim / 2] float32.
    """
    angles = coordinates[..., None].astype(jnp.float32) * _inverse_frequencies(head_dim // 2, theta)
    return angles.reshape(*angles.shape[:-2], head_dim // 2)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns every head of `x` by its token's angles.

    Args:
      x: [..., heads, head_dim].
      angles: [..., head_dim / 2] float32, without the heads dimension.

    Returns:
      Same shape and type as `x`; computed in float32.
    """
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
