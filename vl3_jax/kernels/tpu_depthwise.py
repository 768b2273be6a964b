"""Pallas kernel for TPUs that convolves each channel of maps on its own.

The compiler cuts maps into strips and copies them several times, for matrix units that such a convolution leaves idle.
This kernel holds a padded map of LANES channels in VMEM, and adds up shifted rows of it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vl3_jax.kernels.block_sizes import LANES
from vl3_jax.kernels.segment_info import round_up

_SUBLANES = 8
_MAX_BYTES = 4 * 2**20  # of a padded map of LANES channels


def tpu_depthwise_unsupported_reason(x: jax.Array, kernel: jax.Array) -> str | None:
    """Returns why the kernel does not support these operands, in a few words; None if it does."""
    if x.dtype.name not in ("float32", "bfloat16"):
        return f"maps of {x.dtype.name}"
    if x.shape[3] % LANES or x.shape[2] % _SUBLANES or math.prod(_padded(x.shape, len(kernel))) * 4 > _MAX_BYTES:
        return f"maps of {' x '.join(map(str, x.shape[1:]))}"
    return None


def tpu_depthwise(x: jax.Array, kernel: jax.Array, interpret: bool = False) -> jax.Array:
    """Convolves each channel with its own kernel of an odd size; the maps are padded with zeros and keep their size.

    It has no gradient.

    Args:
      x: Maps, [B, H, W, C].
      kernel: Kernels, [k, k, 1, C].
      interpret: Whether to interpret the kernel, which works on any device but is slow.

    Returns:
      The maps in the dtype of `x`; products are added up in float32.
    """
    rows, height, width, channels = x.shape
    size = len(kernel)
    taps = kernel.reshape(size * size, 1, channels).astype(jnp.float32)
    spec = pl.BlockSpec((1, height, width, LANES), lambda row, part: (row, 0, 0, part))
    return pl.pallas_call(
        functools.partial(depthwise_kernel, size=size),
        grid=(rows, channels // LANES),
        in_specs=[spec, pl.BlockSpec((size * size, 1, LANES), lambda row, part: (0, 0, part))],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(_padded(x.shape, size), jnp.float32)],
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=2 * x.size * x.dtype.itemsize),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name=depthwise_kernel.__name__,
    )(x, taps)


def depthwise_kernel(x, taps, result, padded, *, size: int):
    """Convolves a map of LANES channels, [1, H, W, LANES]. Scratch: the map in float32 with its padding."""
    _, height, width, _ = x.shape
    border = size // 2
    padded[...] = jnp.zeros(padded.shape, jnp.float32)
    padded[border : border + height, border : border + width] = x[0].astype(jnp.float32)

    @pl.loop(0, height)
    def _(row):
        total = jnp.zeros((width, x.shape[3]), jnp.float32)
        for column in range(size):
            for tap in range(size):
                shifted = padded[row + tap, column : column + width]
                total += shifted * taps[tap * size + column]
        result[0, row] = total.astype(result.dtype)


def _padded(shape: tuple[int, ...], size: int) -> tuple[int, int, int]:
    """Returns the shape of a padded map of LANES channels."""
    return shape[1] + size - 1, round_up(shape[2] + size - 1, _SUBLANES), LANES
