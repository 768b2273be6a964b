"""The matrix product of the model, which decides the precision of every product.

float32 operands are multiplied in float32 on every device (not in TPU bfloat16 passes nor in TF32), and low-precision
operands accumulate in float32.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vl3_jax.parallel.rules import current_mesh, target_device

_SUBLANES = 8  # rows of a register of a TPU


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
    out_dtype = out_dtype or dtype
    # On a CPU, XLA multiplies bfloat16 as it is only for a result in float32; else it widens the operands in memory.
    summed = jnp.float32 if dtype == jnp.bfloat16 and target_device().platform == "cpu" else out_dtype
    product = jnp.einsum(equation, *operands, precision=precision, preferred_element_type=summed)
    return product.astype(out_dtype)


def with_full_registers(multiply: Callable[[jax.Array], jax.Array], x: jax.Array, num_in: int = 1) -> jax.Array:
    """Applies a product to at least eight rows on a TPU, whose compiler leaves the matrix unit to fewer rows idle.

    Args:
      multiply: The product, [rows, *in_shape] -> [rows, *out_shape].
      x: Rows, [..., *in_shape]; zeros are added on one device.
      num_in: Number of dimensions of in_shape.

    Returns:
      The product, [..., *out_shape].
    """
    lead, mesh = x.shape[: x.ndim - num_in], current_mesh()
    count = math.prod(lead)
    if count >= _SUBLANES or target_device().platform != "tpu" or (mesh is not None and mesh.size > 1):
        return multiply(x)
    rows = jnp.pad(x.reshape(count, *x.shape[x.ndim - num_in :]), [(0, _SUBLANES - count)] + [(0, 0)] * num_in)
    product = multiply(rows)[:count]
    return product.reshape(*lead, *product.shape[1:])


def tied_product(x: jax.Array, table: jax.Array) -> jax.Array:
    """Multiplies with the transpose of a table in the dtype that it is stored in, of which no wider copy is made.

    float32 values are the sum of three bfloat16 ones, whose products with a bfloat16 table are exact in float32: three
    rows of a product of bfloat16 give a row of float32.

    Args:
      x: Rows, [..., D].
      table: The table, [V, D], of the dtype of `x` or of a narrower one.

    Returns:
      The product, [..., V] float32.
    """
    is_row = x.size == x.shape[-1] and target_device().platform == "cpu"
    if table.dtype != jnp.bfloat16 or not (x.dtype == jnp.float32 or is_row):
        matrix = table.astype(x.dtype)
        return with_full_registers(lambda x: einsum("...d,vd->...v", x, matrix, out_dtype=jnp.float32), x)
    rows = x.reshape(-1, x.shape[-1])
    # With one row of bfloat16, XLA would multiply a copy of the table in float32 on a CPU.
    parts = [rows, jnp.zeros_like(rows)] if x.dtype == jnp.bfloat16 else _bfloat16_parts(rows)
    product = einsum("nd,vd->nv", jnp.concatenate(parts), table, out_dtype=jnp.float32)
    return product.reshape(len(parts), *x.shape[:-1], len(table)).sum(0)


def _bfloat16_parts(x: jax.Array) -> list[jax.Array]:
    """Returns three arrays of bfloat16 whose sum is an array of float32."""
    parts = []
    for _ in range(3):
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


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
