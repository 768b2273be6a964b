"""Every matrix product of the model goes through this function.

Precision is decided here, and here alone: float32 operands are multiplied in float32 on every device (not in
TPU bfloat16 passes nor in TF32), and low-precision operands accumulate in float32.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def einsum(equation: str, *operands: jax.Array, out_dtype: DTypeLike | None = None) -> jax.Array:
    """`jnp.einsum` under the precision policy; the result has `out_dtype`, or the operands' own type."""
    dtype = jnp.result_type(*operands)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(equation, *operands, precision=precision, preferred_element_type=out_dtype or dtype)
