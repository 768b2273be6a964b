"""The matrix product of the model, which decides the precision of every product.

float32 operands are multiplied in float32 on every device (not in TPU bfloat16 passes nor in TF32), and low-precision
operands accumulate in float32.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vl3_jax.parallel.rules import target_device


def einsum(equation: str, *operands: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """`jnp.einsum` under the precision policy of the model.

    Args:
      equation: Subscripts of the operands and the result.
      operands: Arrays to multiply.
      out_dtype: Dtype of the result; None uses the common dtype of the operands.

    Returns:
      The product.
    """
    dtype = jnp.result_type(*operands)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(equation, *operands, precision=precision, preferred_element_type=out_dtype or dtype)


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0, groups: int = 1) -> jax.Array:
    """Two-dimensional convolution under the precision policy of the model.

    Args:
      x: Maps, [B, H, W, I].
      kernel: Kernel, [rows, columns, I / groups, O].
      stride: Rows, and columns, from one output to the next.
      padding: Rows, and columns, of zeros on each side.
      groups: Number of groups of channels that do not mix.

    Returns:
      The convolved maps, [B, H', W', O] in the dtype of `x`.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=precision,
    )


def sum_outer(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sums the outer products of two rows over all rows: the gradient of the kernel of a linear layer.

    Args:
      x: Inputs of the layer, [..., i].
      y: Gradients of its outputs, [..., o].

    Returns:
      The sum, [i, o] float32.
    """
    if target_device().platform == "cpu":
        # With one dimension of rows, XLA transposes the first operand inside the product; with several, in memory. On
        # other platforms they stay apart, because their sharding differs.
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    return einsum("...i,...o->io", x, y, out_dtype=jnp.float32)
