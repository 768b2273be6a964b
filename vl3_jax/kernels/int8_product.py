"""Products with int8 matrices.

On a CPU, XLA would write a float copy of the whole matrix for each product, which takes longer than the product, and
might write those of all layers before the first. There the product is a loop over blocks of the matrix, which are
widened in the processor's cache.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vl3_jax.kernels.einsum import einsum
from vl3_jax.parallel.rules import current_mesh, target_device

_FEW_ROWS = 64
_FEW_ROWS_BLOCK, _BLOCK = 2**21, 2**23  # values of the matrix that are widened at a time


def int8_product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiplies rows with a matrix of integers, which all types of `x` hold exactly.

    Args:
      x: Rows, [..., i] of any float type.
      matrix: The matrix, [i, o] int8.

    Returns:
      The product, [..., o]: float32 on a CPU, elsewhere of the type of `x`.
    """
    if target_device().platform == "cpu" and current_mesh() is None:
        return _blockwise(x.reshape(-1, x.shape[-1]), matrix).reshape(*x.shape[:-1], -1)
    return einsum("...i,io->...o", x, matrix.astype(x.dtype))


def transposed_int8_product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiplies rows with the transpose of a matrix of integers; not differentiable on a CPU.

    Args:
      x: Rows, [..., i] of any float type.
      matrix: The matrix, [o, i] int8.

    Returns:
      The product, [..., o]: float32 on a CPU, elsewhere of the type of `x`.
    """
    if target_device().platform != "cpu" or current_mesh() is not None:
        return einsum("...i,oi->...o", x, matrix.astype(x.dtype))
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) == 1 and x.dtype == jnp.bfloat16:  # as in `_blockwise`
        rows = jnp.concatenate([rows, jnp.zeros_like(rows)])
    width = (_FEW_ROWS_BLOCK if len(rows) <= _FEW_ROWS else _BLOCK) // matrix.shape[1]
    width = min(max(width, 1), len(matrix))
    count, rest = divmod(len(matrix), width)

    def fill(start: jax.Array | int, size: int, product: jax.Array) -> jax.Array:
        block = lax.optimization_barrier(lax.dynamic_slice_in_dim(matrix, start, size))
        part = einsum("ni,oi->no", rows, block.astype(x.dtype), out_dtype=jnp.float32)
        return lax.dynamic_update_slice_in_dim(product, part, start, axis=1)

    product = jnp.zeros((len(rows), len(matrix)), jnp.float32)
    product = lax.fori_loop(0, count, lambda i, product: fill(i * width, width, product), product)
    product = fill(count * width, rest, product) if rest else product
    return product[: math.prod(x.shape[:-1])].reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _blockwise(x: jax.Array, matrix: jax.Array) -> jax.Array:
    rows = len(x)
    if rows == 1 and x.dtype == jnp.bfloat16:  # XLA has a fast product of bfloat16 from two rows on
        x = jnp.concatenate([x, jnp.zeros_like(x)])
    width = (_FEW_ROWS_BLOCK if rows <= _FEW_ROWS else _BLOCK) // matrix.shape[1]
    width = min(max(width, 1), len(matrix))
    count, rest = divmod(len(matrix), width)

    def add(start: jax.Array | int, size: int, total: jax.Array) -> jax.Array:
        # Behind the barrier, the block cannot be widened before the loop, as a part of the whole matrix.
        block = lax.optimization_barrier(lax.dynamic_slice_in_dim(matrix, start, size))
        part = lax.dynamic_slice_in_dim(x, start, size, axis=1)
        return total + einsum("ni,io->no", part, block.astype(x.dtype), out_dtype=jnp.float32)

    total = jnp.zeros((len(x), matrix.shape[1]), jnp.float32)
    total = lax.fori_loop(0, count, lambda i, total: add(i * width, width, total), total)
    return (add(count * width, rest, total) if rest else total)[:rows]


def _forward(x: jax.Array, matrix: jax.Array) -> tuple[jax.Array, tuple]:
    return _blockwise(x, matrix), (matrix, jnp.zeros((0,), x.dtype))


def _backward(residuals: tuple, d_product: jax.Array) -> tuple:
    matrix, like = residuals
    d_x = einsum("no,io->ni", d_product, matrix.astype(d_product.dtype)).astype(like.dtype)
    return d_x, np.zeros(matrix.shape, jax.dtypes.float0)


_blockwise.defvjp(_forward, _backward)
