"""Rotation of queries and keys by their rotary table, the cosines and sines of their positions' angles.

The pairing is half-split: channel i is rotated with channel i + D/2.
"""

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, rotary: jax.Array) -> jax.Array:
    """Rotates the channels of every head by the angles of its token.

    Args:
      x: Queries or keys, [..., heads, D].
      rotary: Rotary table, [..., D] float32, without the dimension of heads: the cosines of the D / 2 angles of a
        token, then their sines.

    Returns:
      The rotated heads, in the shape and dtype of `x`; computed in float32.
    """
    cos, sin = jnp.split(rotary[..., None, :], 2, axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
