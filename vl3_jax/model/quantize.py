"""int8 weight quantisation for inference, which halves the memory of bfloat16 weights.

Quantisation is symmetric, with one scale for each output channel. Only the kernels of the layers and the output head
are quantised, in the layout for serving. These are nearly all parameters; the ones to which the result is sensitive
(embeddings, norms, patch embedding) keep their dtype.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

TIED_HEAD = "llm/tied_head"  # the output head of a model with tied embeddings, [V, D]
TRANSPOSED = ("qkv", "gate_up")  # modules whose kernels are [out, in], for serving


@flax.struct.dataclass
class QuantizedKernel:
    """An int8 kernel, usable in place of a plain array.

    Attributes:
      values: Quantised values, [*out_shape, *in_shape] int8, whatever the order in the kernel.
      scale: Scale of each output channel, [*out_shape, 1, ...] float32, with as many dimensions. Vectors would keep the
        TPU compiler from fetching the next weights while a product runs.
    """

    values: jax.Array
    scale: jax.Array


def quantize_leaf(path: str, leaf: jax.Array) -> jax.Array | QuantizedKernel:
    """Quantises a leaf of the parameters for serving if it is the kernel of a layer or of the output head.

    Args:
      path: Keys of the leaf, joined by "/".
      leaf: The array.

    Returns:
      The quantised kernel, or `leaf` itself.
    """
    contracted = contracted_dimensions(path, leaf.ndim)
    return _quantize(leaf, contracted) if contracted else leaf


def contracted_dimensions(path: str, dimensions: int) -> tuple[int, ...]:
    """Returns those of the dimensions of a kernel that a product contracts; () of a leaf that is not quantised."""
    if path == TIED_HEAD:
        return (1,)
    *modules, module, kind = path.split("/")
    is_layer = any(name.startswith("layers") for name in modules)
    if kind != "kernel" or not (is_layer or module == "lm_head"):
        return ()
    if module in TRANSPOSED:
        return (dimensions - 1,)
    return (0, 1) if module == "out" and dimensions == 3 else (0,)


def outputs_first(dimensions: int, contracted: Sequence[int]) -> tuple[int, ...]:
    """Returns the dimensions of a kernel in their order in quantised values."""
    return (*(axis for axis in range(dimensions) if axis not in contracted), *contracted)


@functools.partial(jax.jit, static_argnums=1)
def _quantize(kernel: jax.Array, contracted: tuple[int, ...]) -> QuantizedKernel:
    kernel = kernel.astype(jnp.float32)
    scale = channel_scale(jnp.max(jnp.abs(kernel), axis=contracted, keepdims=True))
    values = jnp.round(kernel * (1 / jnp.where(scale == 0, 1, scale))).astype(jnp.int8)
    order = outputs_first(kernel.ndim, contracted)
    return QuantizedKernel(values.transpose(order), scale.transpose(order))


# The same in NumPy, for what is quantised while it is read. Both multiply by reciprocals, as the compiler does where
# there are divisions, and give the same bits.


def channel_scale(largest: Any) -> Any:
    """Returns the scales, float32, of channels with these largest magnitudes: arrays of JAX or of NumPy."""
    return largest * np.float32(1 / 127)


def largest_magnitude(kernel: np.ndarray, contracted: Sequence[int]) -> np.ndarray:
    """Returns the largest magnitude of each channel, with size 1 in the contracted dimensions."""
    axes = tuple(contracted)
    return np.maximum(kernel.max(axes, keepdims=True), -kernel.min(axes, keepdims=True))


def rounded(kernel: np.ndarray, scale: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Writes the quantised values of a kernel, still as float32, into `out`, and returns it."""
    np.multiply(kernel, np.float32(1) / np.where(scale == 0, np.float32(1), scale), out=out)
    return np.rint(out, out=out)
