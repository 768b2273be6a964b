"""Rotary position embeddings, one-dimensional (decoder) and axial two-dimensional (tower).

Angles are computed in float32 whatever the model's dtype: in bfloat16 the cosine of a position below 137 is already off
by up to 0.35. Both use the half-split pairing: channel i is rotated with channel i + D/2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32


def _inverse_frequencies(dim: int, theta: float) -> jax.Array:
    """Returns theta^(-2j / dim) for j < dim / 2, [dim / 2] float32."""
    return theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def rotary_angles(positions: Int32[Array, "..."], head_dim: int, theta: float) -> Float32[Array, "... head_dim/2"]:
    """Returns the rotary angles of one-dimensional positions.

    Args:
      positions: Positions, [...] int32.
      head_dim: Channels of a head.
      theta: Base of the frequencies.

    Returns:
      Angles, [..., head_dim / 2] float32.
    """
    return positions[..., None].astype(jnp.float32) * _inverse_frequencies(head_dim, theta)


def axial_rotary_angles(
    coordinates: Int32[Array, "... 2"], head_dim: int, theta: float
) -> Float32[Array, "... head_dim/2"]:
    """Returns the rotary angles of two-dimensional positions.

    The first half of the angles depends on the row, the second on the column.

    Args:
      coordinates: Row and column in the frame's own patch grid, [..., 2] int32.
      head_dim: Channels of a head.
      theta: Base of the frequencies.

    Returns:
      Angles, [..., head_dim / 2] float32.
    """
    angles = coordinates[..., None].astype(jnp.float32) * _inverse_frequencies(head_dim // 2, theta)
    return angles.reshape(*angles.shape[:-2], head_dim // 2)


def rotate(
    x: Float[Array, "... heads head_dim"], angles: Float32[Array, "... head_dim/2"]
) -> Float[Array, "... heads head_dim"]:
    """Rotates the channels of every head by the angles of its token.

    Args:
      x: Queries or keys, [..., heads, head_dim].
      angles: Angles, [..., head_dim / 2] float32, without the dimension of heads.

    Returns:
      The rotated heads, in the shape and dtype of `x`; computed in float32.
    """
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
