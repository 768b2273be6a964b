"""Matrix product with a kernel that is a plain array, int8-quantised, or extended by a LoRA adapter."""

import math

import flax.struct
import jax

from vl3_jax.kernels.einsum import einsum
from vl3_jax.model.quantize import QuantizedKernel


@flax.struct.dataclass
class LoraKernel:
    """A kernel with a low-rank adapter (LoRA, arXiv 2106.09685), usable in place of a plain array.

    Attributes:
      base: The adapted kernel, [*in_shape, *out_shape]; frozen in training.
      a: Down-projection, [*in_shape, rank].
      b: Up-projection, [rank, *out_shape].
      scale: Factor of the product of `a` and `b`, alpha / rank.
    """

    base: jax.Array | QuantizedKernel
    a: jax.Array
    b: jax.Array
    scale: float = flax.struct.field(pytree_node=False, default=1.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the adapted kernel."""
        return self.base.shape


def linear(x: jax.Array, kernel: jax.Array | QuantizedKernel | LoraKernel, num_in: int = 1) -> jax.Array:
    """Contracts the last `num_in` dimensions of `x` with the first `num_in` of `kernel`.

    Args:
      x: Input, [..., *in_shape].
      kernel: Kernel, [*in_shape, *out_shape], cast to the dtype of `x`. The product with a quantised kernel is scaled
        afterwards; the contribution of an adapter is added.
      num_in: Number of contracted dimensions.

    Returns:
      The product, [..., *out_shape] in the dtype of `x`.
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
