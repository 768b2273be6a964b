"""The product with a kernel, in whichever form the kernel is stored: plain, int8, or with an adapter."""

import math

import flax.struct
import jax

from vl3_jax.kernels.einsum import einsum
from vl3_jax.model.quantize import QuantizedKernel


@flax.struct.dataclass
class LoraKernel:
    """A kernel with a low-rank adapter (LoRA, arXiv 2106.09685); it stands wherever a plain array may.

    Attributes:
      base: [*in_shape, *out_shape], the kernel adapted; frozen in training.
      a: [*in_shape, rank].
      b: [rank, *out_shape].
      scale: alpha / rank, the factor of the product of `a` and `b`.
    """

    base: jax.Array | QuantizedKernel
    a: jax.Array
    b: jax.Array
    scale: float = flax.struct.field(pytree_node=False, default=1.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.base.shape


def linear(x: jax.Array, kernel: jax.Array | QuantizedKernel | LoraKernel, num_in: int = 1) -> jax.Array:
    """Contracts the last `num_in` dimensions of `x` with the first `num_in` of `kernel`, cast to `x`'s type.

    Args:
      x: [..., *in_shape].
      kernel: [*in_shape, *out_shape]; a quantised one is scaled after the product, an adapter's part is added.

    Returns:
      [..., *out_shape], in the type of `x`.
    """
    if isinstance(kernel, LoraKernel):
        return linear(x, kernel.base, num_in) + kernel.scale * linear(linear(x, kernel.a, num_in), kernel.b)
    in_shape, out_shape = kernel.shape[:num_in], kernel.shape[num_in:]
    quantized = isinstance(kernel, QuantizedKernel)
    matrix = (kernel.values if quantized else kernel).astype(x.dtype).reshape(math.prod(in_shape), -1)
    flat = x.reshape(*x.shape[: x.ndim - num_in], math.prod(in_shape))
    product = einsum("...i,io->...o", flat, matrix)
    if quantized:
        product = (product * kernel.scale.reshape(-1)).astype(x.dtype)
    return product.reshape(*flat.shape[:-1], *out_shape)
