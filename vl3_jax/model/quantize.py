"""int8 weights: half of bfloat16's memory, for inference on a chip that would not hold the model otherwise.

Symmetric, one scale for each output channel. Only the kernels of the layers and an untied output head are
quantised: nearly all parameters, and none that the result is sensitive to (embeddings, norms, patch embedding).
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class QuantizedKernel:
    """A kernel that stands wherever a plain array may.

    Attributes:
      values: int8, the kernel's own shape.
      scale: float32, the same but 1 for the dimensions that are contracted.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.values.shape


def quantize_leaf(path: str, leaf: jax.Array) -> jax.Array | QuantizedKernel:
    """Quantises one leaf of the parameter tree if it is a kernel worth it, else gives it back.

    Args:
      path: its place, joined by "/".
      leaf: the array.
    """
    *modules, module, kind = path.split("/")
    if kind != "kernel" or ("layers" not in modules and module != "lm_head"):
        return leaf
    first = int("layers" in modules)  # stacked layers come first and are never contracted
    contracted = (first, first + 1) if module == "out" else (first,)
    return _quantize(leaf, contracted)


@functools.partial(jax.jit, static_argnums=1)
def _quantize(kernel: jax.Array, contracted: tuple[int, ...]) -> QuantizedKernel:
    wide = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=contracted, keepdims=True) / 127
    values = jnp.round(wide / jnp.where(scale == 0, 1, scale)).astype(jnp.int8)
    return QuantizedKernel(values, scale)
