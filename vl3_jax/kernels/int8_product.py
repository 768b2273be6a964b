"""Products of activations with int8 kernels.

Converting a kernel to the type of the activations takes longer than reading it, on a CPU and on a TPU. Both have a fast
product of int8 with int8: each row of activations is split into two int8 parts, whose sum has 16 bits of its largest
magnitude, and the product of both with the kernel is exact. On a TPU this pays for the few rows of a decoding step.
"""

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vl3_jax.kernels.einsum import einsum
from vl3_jax.parallel.rules import target_device

_LEVELS = 127  # of an int8
_PARTS = 2 * _LEVELS  # of the step of the first part that a step of the second one is
_MANY = 16  # rows of activations from which on a CPU multiplies the parts one after the other, in half the memory
_FEW, _SHORT = 2, 4096  # rows of activations, and their values, up to which a CPU folds rows of a kernel
_TPU_ROWS = 32  # rows of activations up to which a TPU multiplies two parts sooner than it converts the kernel
_INT8_TPU = re.compile("TPU v[456]")  # generations whose matrix units take int8


def int8_product(x: jax.Array, values: jax.Array, num_in: int, whole_inputs: bool = True) -> jax.Array:
    """Multiplies activations with an int8 kernel.

    Args:
      x: Activations, [..., *in_shape] of any float type.
      values: Kernel, [*out_shape, *in_shape] int8.
      num_in: Number of dimensions of `in_shape`.
      whole_inputs: Whether each device has all inputs of its outputs. Where it has not, a TPU converts the kernel,
        because the largest magnitude of a row would have to be agreed on first.

    Returns:
      The product, [..., *out_shape] float32.
    """
    rows, out_shape = x.shape[: x.ndim - num_in], values.shape[: values.ndim - num_in]
    matrix = values.reshape(math.prod(out_shape), -1)
    flat, device = x.reshape(math.prod(rows), -1), target_device()
    if device.platform == "cpu":
        product = _split_product(flat, lambda parts: _cpu_product(matrix, parts))
    elif whole_inputs and len(flat) <= _TPU_ROWS and _INT8_TPU.match(device.device_kind):
        product = _split_product(flat, lambda parts: _int32_product("pni,oi->pno", parts, matrix))
    else:
        unmerged = x.reshape(*rows, -1)  # rows and tokens may be sharded
        product = einsum("...i,oi->...o", unmerged, matrix.astype(x.dtype), out_dtype=jnp.float32)
    return product.reshape(*rows, *out_shape)


def _split_product(x: jax.Array, multiply: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Multiplies activations in two int8 parts.

    Args:
      x: Activations, [n, i].
      multiply: Exact product with the kernel, [2, n, i] int8 -> [2, n, o] int32.

    Returns:
      The product, [n, o] float32.
    """
    x = x.astype(jnp.float32)
    step = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / _LEVELS
    scaled = x / jnp.where(step == 0, 1, step)
    high = jnp.round(scaled)
    low = jnp.round((scaled - high) * _PARTS)
    sums = multiply(jnp.stack([high.astype(jnp.int8), low.astype(jnp.int8)])).astype(jnp.float32)
    return (sums[0] + sums[1] / _PARTS) * step


def _cpu_product(matrix: jax.Array, parts: jax.Array) -> jax.Array:
    """Multiplies parts of rows, [2, n, i] int8, with a kernel [o, i]; returns [2, n, o] int32."""
    if parts.shape[1] >= _MANY:
        return jnp.stack([_exact_product(matrix, part) for part in parts])
    return _exact_product(matrix, parts.reshape(-1, parts.shape[-1])).reshape(*parts.shape[:-1], -1)


def _exact_product(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    """Multiplies int8 rows [n, i] with a kernel [o, i]; returns [n, o] int32."""
    # The kernel is the first operand: the second one is packed anew for each product.
    folds = 2 if len(rows) <= _FEW and rows.shape[1] <= _SHORT and len(matrix) % 2 == 0 else 1
    if folds > 1:  # two rows of the kernel as one, because the product is faster along long rows
        matrix = matrix.reshape(-1, folds * matrix.shape[1])
        blocks = jnp.eye(folds, dtype=jnp.int8)[:, None, :, None] * rows[None, :, None, :]
        sums = _int32_product("oi,ni->on", matrix, blocks.reshape(folds * len(rows), -1))  # [o / folds, folds * n]
        return sums.reshape(-1, len(rows)).T
    return _int32_product("oi,ni->on", matrix, rows).T


def _int32_product(equation: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.int32)
