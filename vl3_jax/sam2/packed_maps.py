"""Maps whose pixels lie side by side, as the channels of the cells of one grid.

Few channels of many pixels fill a small part of a TPU's registers, and to double or to halve a map moves every pixel.
Packed, all maps of a grid have the same cells; only the number of pixels and of channels in a cell differs.

Dimension names: B images or objects, G rows and columns of the grid, n rows and columns of pixels in a cell, C channels
of a pixel. A packed map is [B, G, G, n * n * C].
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vl3_jax.kernels.einsum import einsum
from vl3_jax.model.layers import partitioned_param

_KERNEL, _STRIDE = 3, 2


def packed(x: Float[Array, "B H W C"], grid: int) -> Float[Array, "B G G P"]:
    """Packs maps of H = W = G * n pixels."""
    batch, height, _, channels = x.shape
    side = height // grid
    x = x.reshape(batch, grid, side, grid, side, channels).swapaxes(2, 3)
    return x.reshape(batch, grid, grid, -1)


class HalvingConv(nn.Module):
    """Convolution of 3 x 3 pixels with stride 2 and one row of padding, of a packed map.

    A cell that results is a product of four cells. Their kernels hold that of the convolution once for each pixel that
    results, and zeros elsewhere: on a TPU, to multiply by zeros takes less time than to move pixels.

    Attributes:
      shape: Channels of a pixel before and after.
      side: Rows, and columns, of pixels in a cell before; there are half as many after.
      param_dtype: Dtype of the parameters.
    """

    shape: tuple[int, int]
    side: int
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B G G P"]) -> Float[Array, "B G G Q"]:
        shape, axes = (_KERNEL, _KERNEL, *self.shape), (None, None, None, "vision_embed")
        init, zeros = nn.initializers.normal((_KERNEL**2 * self.shape[0]) ** -0.5), nn.initializers.zeros
        kernel = partitioned_param(self, "kernel", init, shape, axes, self.param_dtype).astype(x.dtype)
        bias = partitioned_param(self, "bias", zeros, shape[3:], axes[3:], self.param_dtype).astype(jnp.float32)
        reads = jnp.asarray(_reads(self.side), x.dtype)
        kernel = einsum("arpd,bsqe,deio->abrsipqo", reads, reads, kernel)
        kernel, grid = kernel.reshape(2, 2, x.shape[-1], -1), x.shape[1]
        x = jnp.pad(x, [(0, 0), (1, 0), (1, 0), (0, 0)])
        products = [
            einsum("bhwi,io->bhwo", x[:, i : i + grid, j : j + grid], kernel[i, j], out_dtype=jnp.float32)
            for i in range(2)
            for j in range(2)
        ]
        return sum(products, jnp.tile(bias, (self.side // _STRIDE) ** 2)).astype(x.dtype)


def _reads(side: int) -> np.ndarray:
    """Returns whether a row of a cell that results is made of a row of the cell before, or of that cell itself.

    Returns:
      Zeros and ones, [2 cells, side rows, side / 2 rows that result, row of the kernel].
    """
    found = np.zeros((2, side, side // _STRIDE, _KERNEL), np.float32)
    for result, row in np.ndindex(found.shape[2:]):
        cell, pixel = divmod(side + _STRIDE * result + row - 1, side)
        found[cell, pixel, result, row] = 1
    return found


class PackedNorm(nn.Module):
    """Layer normalisation of each pixel of a packed map, computed in float32.

    Attributes:
      channels: Channels of a pixel.
      eps: Added to the variance.
      param_dtype: Dtype of the parameters.
    """

    channels: int
    eps: float
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B G G P"]) -> Float[Array, "B G G P"]:
        parameter = lambda name, init: partitioned_param(  # noqa: E731
            self, name, init, (self.channels,), ("vision_embed",), self.param_dtype
        ).astype(jnp.float32)
        scale, bias = parameter("scale", nn.initializers.ones), parameter("bias", nn.initializers.zeros)
        pixels = x.shape[-1] // self.channels
        mean, square = self._means(x, pixels)
        variance = jnp.maximum(square - mean**2, 0)
        normalised = (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(variance + self.eps)
        return (normalised * jnp.tile(scale, pixels) + jnp.tile(bias, pixels)).astype(x.dtype)

    def _means(self, x: Float[Array, "B G G P"], pixels: int) -> tuple[jax.Array, jax.Array]:
        """Returns the means over the channels of each pixel, of values and of their squares, in each of its channels.

        They are products, which do not move channels between registers; those of bfloat16 are exact, because a square
        is the sum of two such numbers.
        """
        same = jnp.asarray(np.kron(np.eye(pixels), np.ones((self.channels, self.channels))), x.dtype)
        sums = lambda x: einsum("bhwi,io->bhwo", x, same, out_dtype=jnp.float32)  # noqa: E731
        squares = x.astype(jnp.float32) ** 2
        high = squares.astype(x.dtype)
        of_squares = sums(high)
        if x.dtype != jnp.float32:
            of_squares += sums((squares - high.astype(jnp.float32)).astype(x.dtype))
        return sums(x) / self.channels, of_squares / self.channels
