"""The matrix product of the model, which decides the precision of every product.

float32 operands are multiplied in float32 on every device (not in TPU bfloat16 passes nor in TF32), and low-precision
operands accumulate in float32.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


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
