"""Rotation of queries and keys by their rotary table, the cosines and sines of their positions' angles.

The pairing is half-split: channel i is rotated with channel i + D/2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


def rotate(
    x: Float[Array, "... heads head_dim"], rotary: Float32[Array, "... head_dim"]
) -> Float[Array, "... heads head_dim"]:
    """Rotates the channels of every head by the angles of its token.

    Args:
      x: Queries or keys, [..., heads, head_dim].
      rotary: Rotary table, [..., head_dim] float32, without the dimension of heads: the cosines of the head_dim / 2
        angles of a token, then their sines.

    Returns:
      The rotated heads, in the shape and dtype of `x`; computed in float32.
    """
    cos, sin = jnp.split(rotary[..., None, :], 2, axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
