"""Products of activations with int8 kernels.

On a CPU, XLA has a fast product of int8 with int8 and none of float32 with int8: converting a kernel takes longer than
reading it in float32. So each row of activations is split into two int8 parts, whose sum has 16 bits of its largest
magnitude; the product of both with the kernel is exact.
"""

import math

import jax
import jax.numpy as jnp

from vl3_jax.kernels.einsum import einsum
from vl3_jax.parallel.rules import target_device

_LEVELS = 127  # of an int8
_PARTS = 2 * _LEVELS  # of the step of the first part that a step of the second one is
_MANY = 16  # rows of activations from which on the parts are multiplied one after the other, in half the memory
_FEW, _SHORT = 2, 4096  # rows of activations, and their values, up to which rows of a kernel are folded


def int8_product(x: jax.Array, values: jax.Array, num_in: int, output_first: bool) -> jax.Array:
    """Multiplies activations with an int8 kernel.

    Args:
      x: Activations, [..., *in_shape] of any float type.
      values: Kernel, int8; [*out_shape, *in_shape] if `output_first`, else [*in_shape, *out_shape].
      num_in: Number of dimensions of `in_shape`.
      output_first: Order of the dimensions of the kernel.

    Returns:
      The product, [..., *out_shape] float32.
    """
    rows, split = x.shape[: x.ndim - num_in], values.ndim - num_in if output_first else num_in
    out_shape = values.shape[:split] if output_first else values.shape[split:]
    flat, matrix = x.reshape(*rows, -1), values.reshape(math.prod(values.shape[:split]), -1)
    if not output_first:
        product = einsum("...i,io->...o", flat, matrix.astype(x.dtype), out_dtype=jnp.float32)
    elif target_device().platform == "cpu":
        product = _split_product(flat.reshape(-1, flat.shape[-1]), matrix)
    else:
        product = einsum("...i,oi->...o", flat, matrix.astype(x.dtype), out_dtype=jnp.float32)
    return product.reshape(*rows, *out_shape)


def _split_product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """Multiplies activations [n, i] with a kernel [o, i] in two int8 parts; returns [n, o] float32."""
    x = x.astype(jnp.float32)
    step = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / _LEVELS
    scaled = x / jnp.where(step == 0, 1, step)
    high = jnp.round(scaled)
    low = jnp.round((scaled - high) * _PARTS)
    parts = [high.astype(jnp.int8), low.astype(jnp.int8)]
    if len(x) < _MANY:
        parts = [jnp.concatenate(parts)]
    sums = jnp.concatenate([_exact_product(matrix, part).astype(jnp.float32) for part in parts])
    return (sums[: len(x)] + sums[len(x) :] / _PARTS) * step


def _exact_product(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    """Multiplies int8 rows [n, i] with a kernel [o, i]; returns [n, o] int32."""
    folds = 2 if len(rows) <= _FEW and rows.shape[1] <= _SHORT and len(matrix) % 2 == 0 else 1
    if folds > 1:  # two rows of the kernel as one, because the product is faster along long rows
        matrix = matrix.reshape(-1, folds * matrix.shape[1])
        blocks = jnp.eye(folds, dtype=jnp.int8)[:, None, :, None] * rows[None, :, None, :]
        sums = _product(matrix, blocks.reshape(folds * len(rows), -1))  # [o / folds, folds * n]
        return sums.reshape(-1, len(rows)).T
    return _product(matrix, rows).T


def _product(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    # The kernel is the first operand: the second one is packed anew for each product.
    return jnp.einsum("oi,ni->on", matrix, rows, preferred_element_type=jnp.int32)
