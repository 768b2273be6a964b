"""int8 weight quantisation for inference, which halves the memory of bfloat16 weights.

Quantisation is symmetric, with one scale for each output channel. Only the kernels of the layers and the output head
are quantised. These are nearly all parameters; the ones to which the result is sensitive (embeddings, norms, patch
embedding) keep their dtype.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

TIED_HEAD = "llm/tied_head"  # the output head of a model with tied embeddings, [V, D]
TRANSPOSED = ("qkv", "gate_up")  # modules whose kernels are [out, in], those of the layouts for serving


@flax.struct.dataclass
class QuantizedKernel:
    """An int8 kernel, usable in place of a plain array.

    Attributes:
      values: Quantised values, int8 in the shape of the kernel; or with the dimensions of the input last.
      scale: Scale of each output channel, float32, in the shape of the kernel with size 1 in the contracted dimensions.
      inputs_last: Number of the input's dimensions, if they come last in `values`; 0 if they come first.
    """

    values: jax.Array
    scale: jax.Array
    inputs_last: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        outputs = self.values.ndim - self.inputs_last
        return (*self.values.shape[outputs:], *self.values.shape[:outputs])


def quantize_leaf(path: str, leaf: jax.Array, inputs_last: bool = False) -> jax.Array | QuantizedKernel:
    """Quantises a leaf of the parameter tree if it is the kernel of a layer or of the output head.

    Args:
      path: Keys of the leaf, joined by "/".
      leaf: The array.
      inputs_last: Whether the dimensions of the input, where they are first, come last in the values.

    Returns:
      The quantised kernel, or `leaf` itself.
    """
    contracted = contracted_dimensions(path, leaf.ndim)
    if not contracted:
        return leaf
    kernel = _quantize(leaf, contracted)
    if inputs_last and contracted[0] == 0:
        inputs = len(contracted)
        order = (*range(inputs, leaf.ndim), *range(inputs))
        return QuantizedKernel(kernel.values.transpose(order), kernel.scale, inputs)
    return kernel


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
    first = int("layers" in modules)  # the dimension of stacked layers comes first and is never contracted
    return (first, first + 1) if module == "out" and dimensions == first + 3 else (first,)


@functools.partial(jax.jit, static_argnums=1)
def _quantize(kernel: jax.Array, contracted: tuple[int, ...]) -> QuantizedKernel:
    kernel = kernel.astype(jnp.float32)
    scale = channel_scale(jnp.max(jnp.abs(kernel), axis=contracted, keepdims=True))
    values = jnp.round(kernel * (1 / jnp.where(scale == 0, 1, scale))).astype(jnp.int8)
    return QuantizedKernel(values, scale)


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
