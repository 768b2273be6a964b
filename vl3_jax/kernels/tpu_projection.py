"""Pallas kernel for TPUs that projects tokens to heads and rotates them by the positions of repeated maps.

The compiler would multiply once for each channel and once for the one that it is rotated with, write both to memory,
and read them again. Here the two halves of a head are whole registers of one product, which is written once, rotated.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vl3_jax.kernels.block_sizes import LANES
from vl3_jax.kernels.einsum import einsum

_BLOCKS = (512, 256, 128)  # tokens of a grid step, the first that divides their number
_MAX_WIDTH = 1024  # channels of tokens and of all heads, whose matrix stays in VMEM


def tpu_projection_unsupported_reason(x: jax.Array, kernel: jax.Array, rotary: jax.Array | None) -> str | None:
    """Returns why the kernel does not support these operands, in a few words; None if it does."""
    if x.dtype.name not in ("float32", "bfloat16"):
        return f"tokens of {x.dtype.name}"
    width, heads, head_dim = kernel.shape
    if head_dim % (2 * LANES) or max(width, heads * head_dim) > _MAX_WIDTH:
        return f"{width} channels to {heads} heads of {head_dim}"
    if _block(x, rotary) is None:
        return f"rows of {x.shape[1]} tokens"
    return None


def tpu_projection(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    rotary: jax.Array | None = None,
    map_positions: jax.Array | None = None,
    other_positions: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Projects tokens to heads and rotates them as `vl3_jax.kernels.rotary.rotate` does; it has no gradient.

    Args:
      x: Tokens of rows, [B, L, I]: maps of N tokens, then others, which are not rotated.
      kernel: Kernel of the projection, [I, H, D], cast to the dtype of `x`.
      bias: Bias of the projection, [H, D].
      rotary: Rotary table of the tokens of a map, [N, D] float32; None rotates nothing.
      map_positions: What is added to the tokens of the maps, in all rows alike, [M, I], where M is a multiple of N.
      other_positions: What is added to the other tokens, [B, L - M, I]; without both, a row is one map.
      interpret: Whether to interpret the kernel, which works on any device but is slow.

    Returns:
      The heads, [B, L, H, D] in the dtype of `x`.
    """
    (rows, length, width), (_, heads, head_dim) = x.shape, kernel.shape
    block = _block(x, rotary)
    assert block is not None, tpu_projection_unsupported_reason(x, kernel, rotary)
    steps, channels = length // block, heads * head_dim
    in_map = steps if rotary is None else len(rotary) // block
    in_maps = in_map if map_positions is None else len(map_positions) // block

    def in_row(step):
        # The blocks of all maps at the same positions follow each other, so that their table is read once.
        maps = in_maps // in_map
        return step if maps == 1 else jnp.where(step < in_maps, step % maps * in_map + step // maps, step)

    def table_block(step, row):
        return jnp.where(step < in_maps, step // (in_maps // in_map), in_map), 0

    token_spec = pl.BlockSpec((block, width), lambda step, row: (row * steps + in_row(step), 0))
    whole = lambda *shape: pl.BlockSpec(shape, lambda step, row: (0, 0))  # noqa: E731
    operands = [x.reshape(-1, width), kernel.reshape(width, -1).astype(x.dtype)]
    operands += [bias.reshape(1, -1).astype(jnp.float32)]
    specs = [token_spec, whole(width, channels), whole(1, channels)]
    if rotary is not None:
        operands.append(jnp.concatenate([rotary, jnp.tile(_unrotated(head_dim), (block, 1))]))
        specs.append(pl.BlockSpec((block, head_dim), table_block))
    if map_positions is not None and other_positions is not None:
        others = steps - in_maps
        elsewhere = other_positions.reshape(-1, width) if others else jnp.zeros((block, width))
        operands += [map_positions.astype(x.dtype), elsewhere.astype(x.dtype)]
        specs.append(pl.BlockSpec((block, width), lambda step, row: (jnp.minimum(in_row(step), in_maps - 1), 0)))
        other = lambda step, row: (jnp.where(step < in_maps, 0, row * others + step - in_maps), 0)  # noqa: E731
        specs.append(pl.BlockSpec((block, width), other))
    result = jax.ShapeDtypeStruct((rows * length, channels), x.dtype)
    nbytes = sum(math.prod(array.shape) * array.dtype.itemsize for array in (*operands, result))
    flops = 2 * rows * length * width * channels
    projected = pl.pallas_call(
        functools.partial(
            projection_kernel,
            head_dim=head_dim,
            is_rotated=rotary is not None,
            in_maps=None if map_positions is None else in_maps,
        ),
        grid=(steps, rows),
        in_specs=specs,
        out_specs=pl.BlockSpec((block, channels), token_spec.index_map),
        out_shape=result,
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=nbytes),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name=projection_kernel.__name__,
    )(*operands)
    return projected.reshape(rows, length, heads, head_dim)


def projection_kernel(x, kernel, bias, *others, head_dim: int, is_rotated: bool, in_maps: int | None):
    """Projects a block of tokens, [block, I] -> [block, H * D].

    The other references are the rotary table, what is added to a token of a map or of none, and the result.
    """
    *others, result = others
    half, tokens = head_dim // 2, x[...]
    if in_maps is not None:
        in_map, elsewhere = others[-2:]
        tokens += jnp.where(pl.program_id(0) < in_maps, in_map[...], elsewhere[...])
    product = einsum("ti,io->to", tokens, kernel[...], out_dtype=jnp.float32) + bias[...]
    for start in range(0, product.shape[1], head_dim):
        first, second = product[:, start : start + half], product[:, start + half : start + head_dim]
        if is_rotated:
            cos, sin = others[0][:, :half], others[0][:, half:]
            first, second = first * cos - second * sin, second * cos + first * sin
        result[:, start : start + half] = first.astype(result.dtype)
        result[:, start + half : start + head_dim] = second.astype(result.dtype)


def _block(x: jax.Array, rotary: jax.Array | None) -> int | None:
    """Returns the tokens of a grid step, which divide the rows and the maps; None if there is no such number."""
    counts = [x.shape[1]] if rotary is None else [x.shape[1], len(rotary)]
    return next((block for block in _BLOCKS if not any(count % block for count in counts)), None)


def _unrotated(width: int) -> jax.Array:
    """Returns the rotary table of a token that is not rotated, [1, width] float32."""
    return jnp.concatenate([jnp.ones((1, width // 2)), jnp.zeros((1, width // 2))], axis=1)
