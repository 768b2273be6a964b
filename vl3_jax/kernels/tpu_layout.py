"""Pallas kernels for TPUs that bring heads into the layout of the attention kernels, and results back from it.

A product of tokens and a projection is [T, heads * D]: a head is a window of D lanes of it, which begins anywhere in a
register. The attention kernels take [heads, T, W], one head at a time, padded with zeros to whole registers: W is LANES
or, of wider heads, D, a multiple of 2 * LANES. The compiler's own way from one to the other passes through
[T, heads, D], whose registers hold few channels each, several times over; these kernels read and write every array
once. On the way they rotate queries and keys by their rotary tables, and add up what the backward pass needs of outputs
and their gradients.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vl3_jax.kernels.block_sizes import LANES
from vl3_jax.kernels.segment_info import round_up

_BLOCK = 256  # tokens of a grid step, if their double buffers fit
_BUFFER_BYTES = 12 * 2**20  # of the 16 MiB of VMEM that a kernel has by default


def heads_first(x: jax.Array, heads: int, rotary: jax.Array | None, interpret: bool) -> jax.Array:
    """Brings heads into the layout of the attention kernels.

    Args:
      x: Heads of D channels side by side, [T, heads * D], where T is a multiple of LANES.
      heads: Number of heads.
      rotary: Rotary table by which the heads are rotated, [T, D] float32; None leaves them as they are.
      interpret: Whether to interpret the kernel.

    Returns:
      The heads, [heads, T, W] in the dtype of `x`, with zeros behind their channels.
    """
    width = x.shape[1] // heads
    if heads == 1 and width % LANES == 0 and rotary is None:
        return x[None]
    result = jax.ShapeDtypeStruct((heads, x.shape[0], round_up(width, LANES)), x.dtype)
    kernel = functools.partial(_heads_first_kernel, width=width)
    return _run(kernel, [x, *_tables(rotary)], [result], interpret)[0]


def tokens_first(x: jax.Array, width: int, rotary: jax.Array | None, interpret: bool) -> jax.Array:
    """Brings heads back from the layout of the attention kernels; the transpose of `heads_first`.

    Args:
      x: Heads, [heads, T, W], with zeros behind their channels.
      width: Number of channels of a head, D.
      rotary: Rotary table against which the heads are rotated, [T, D] float32; None leaves them as they are.
      interpret: Whether to interpret the kernel.

    Returns:
      The heads side by side, [T, heads * D] in the dtype of `x`.
    """
    heads, tokens, _ = x.shape
    if heads == 1 and width % LANES == 0 and rotary is None:
        return x[0]
    result = jax.ShapeDtypeStruct((tokens, heads * width), x.dtype)
    kernel = functools.partial(_tokens_first_kernel, width=width)
    return _run(kernel, [x, *_tables(rotary)], [result], interpret)[0]


def heads_first_with_delta(
    d_out: jax.Array, out: jax.Array, heads: int, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Brings the gradient of attention's output into the layout of the kernels, and adds up its products with it.

    Args:
      d_out: Gradient of the output, [T, heads * D], where T is a multiple of LANES.
      out: The output, of the same shape.
      heads: Number of heads.
      interpret: Whether to interpret the kernel.

    Returns:
      The gradient, [heads, T, W] in its dtype, and the sum over each head's channels of output times gradient,
      [heads, 1, T] float32.
    """
    width, tokens = d_out.shape[1] // heads, d_out.shape[0]
    results = [
        jax.ShapeDtypeStruct((heads, tokens, round_up(width, LANES)), d_out.dtype),
        jax.ShapeDtypeStruct((heads, 1, tokens), jnp.float32),
    ]
    kernel = functools.partial(_heads_first_with_delta_kernel, width=width)
    moved, delta = _run(kernel, [d_out, out], results, interpret)
    return moved, delta


def _heads_first_kernel(x, *tables_and_result, width):
    *tables, result = tables_and_result
    factors = _factors(tables, width)
    for head in range(result.shape[0]):
        window = _window(x, head * width, width)
        result[head] = _rotated(window, factors, width).astype(result.dtype)


def _tokens_first_kernel(x, *tables_and_result, width):
    *tables, result = tables_and_result
    factors = _factors(tables, width)
    if factors:
        factors = factors[0], -factors[1]
    if width > LANES:
        for head in range(x.shape[0]):
            window = _rotated(x[head].astype(jnp.float32), factors, width)
            result[:, head * width : (head + 1) * width] = window.astype(result.dtype)
        return
    lane = _lane(result.shape[0])
    tiles = [jnp.zeros((result.shape[0], LANES), jnp.float32)]
    for head in range(x.shape[0]):
        window = _rotated(x[head].astype(jnp.float32), factors, width)
        tile, start = divmod(head * width, LANES)
        if tile == len(tiles):
            tiles.append(jnp.zeros_like(tiles[0]))
        window = _roll(window, start)
        if start + width <= LANES:
            tiles[tile] += window
        else:
            tiles[tile] += jnp.where(lane >= start, window, 0.0)
            tiles.append(jnp.where(lane < start, window, 0.0))
    for index, tile in enumerate(tiles):
        start, stop = index * LANES, min((index + 1) * LANES, result.shape[1])
        result[:, start:stop] = tile[:, : stop - start].astype(result.dtype)


def _heads_first_with_delta_kernel(d_out, out, result, delta, *, width):
    for head in range(result.shape[0]):
        gradient = _window(d_out, head * width, width)
        result[head] = gradient.astype(result.dtype)
        products = (gradient * _window(out, head * width, width)).sum(-1, keepdims=True)
        delta[head] = jnp.broadcast_to(products, (len(gradient), LANES)).T[:1]


def _window(x, start: int, width: int) -> jax.Array:
    """Returns x[:, start : start + width] in the first lanes of [tokens, W] float32, and zeros in the others."""
    if width > LANES:
        return x[:, start : start + width].astype(jnp.float32)
    tile, offset = divmod(start, LANES)
    window = _roll(_tile(x, tile), -offset)
    lane = _lane(window.shape[0])
    if offset + width > LANES:
        rest = _roll(_tile(x, tile + 1), -offset)
        window = jnp.where(lane < LANES - offset, window, rest)
    return window if width == LANES else jnp.where(lane < width, window, 0.0)


def _tile(x, index: int) -> jax.Array:
    """Returns the channels of a register, [tokens, LANES] float32, with zeros behind the last ones."""
    tile = x[:, index * LANES : min((index + 1) * LANES, x.shape[1])].astype(jnp.float32)
    missing = jnp.zeros((tile.shape[0], LANES - tile.shape[1]), jnp.float32)
    return jnp.concatenate([tile, missing], axis=1) if missing.shape[1] else tile


def _factors(tables: Sequence, width: int) -> tuple[jax.Array, jax.Array] | None:
    """Returns by what a channel and its partner are multiplied, [tokens, W] each; zeros behind the channels."""
    if not tables:
        return None
    table, half = tables[0][...], width // 2
    if width > LANES:
        cos, sin = table[:, :half], table[:, half:]
        return jnp.concatenate([cos, cos], axis=1), jnp.concatenate([-sin, sin], axis=1)
    lane = _lane(table.shape[0])
    cos = jnp.where(lane < half, table, _roll(table, half))
    sin = jnp.where(lane < half, -_roll(table, -half), table)
    return jnp.where(lane < width, cos, 0.0), jnp.where(lane < width, sin, 0.0)


def _rotated(x: jax.Array, factors: tuple[jax.Array, jax.Array] | None, width: int) -> jax.Array:
    """Rotates the channels of a head, [tokens, W] float32."""
    if factors is None:
        return x
    half = width // 2
    if width > LANES:
        partner = jnp.concatenate([x[:, half:], x[:, :half]], axis=1)
    else:
        partner = jnp.where(_lane(x.shape[0]) < half, _roll(x, -half), _roll(x, half))
    return x * factors[0] + partner * factors[1]


def _roll(x: jax.Array, shift: int) -> jax.Array:
    return pltpu.roll(x, shift % LANES, 1) if shift % LANES else x


def _lane(tokens: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (tokens, LANES), 1)


def _tables(rotary: jax.Array | None) -> list[jax.Array]:
    return [] if rotary is None else [_whole_lanes(rotary)]


def _whole_lanes(x: jax.Array) -> jax.Array:
    """Pads the last dimension with zeros to whole registers."""
    return jnp.pad(x, ((0, 0), (0, round_up(x.shape[1], LANES) - x.shape[1])))


def _run(
    kernel: functools.partial[None],
    operands: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    interpret: bool,
) -> Sequence[jax.Array]:
    """Runs a kernel over blocks of tokens: those of axis 0 of a matrix, and of the axis of a longer array below."""
    arrays, tokens = [*operands, *results], operands[-1].shape[-2]
    nbytes = sum(array.size * array.dtype.itemsize for array in arrays)
    block = _BLOCK if tokens % _BLOCK == 0 and 2 * _BLOCK * nbytes <= tokens * _BUFFER_BYTES else LANES

    def spec(array) -> pl.BlockSpec:
        axis = 0 if array.ndim == 2 else 2 if array.shape[1] == 1 else 1
        shape = [block if i == axis else size for i, size in enumerate(array.shape)]
        return pl.BlockSpec(tuple(shape), lambda step: tuple(step if i == axis else 0 for i in range(array.ndim)))

    return pl.pallas_call(
        kernel,
        grid=(tokens // block,),
        in_specs=[spec(operand) for operand in operands],
        out_specs=[spec(result) for result in results],
        out_shape=list(results),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=nbytes),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name=kernel.func.__name__.strip("_"),
    )(*operands)
