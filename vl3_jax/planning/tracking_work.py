"""Arithmetic of SAM-2: what its image encoder multiplies, and what its TPU kernels execute.

A multiply-add is 2 FLOPs. Useful work leaves out what kernels multiply only because blocks and registers are whole.
"""

from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from vl3_jax.kernels.block_sizes import LANES
from vl3_jax.kernels.segment_info import round_up
from vl3_jax.planning.kernel_work import visited_pairs
from vl3_jax.sam2.hiera import joined_windows, window_numbers
from vl3_jax.sam2.memory_bank import padded_tokens
from vl3_jax.sam2.sam2_config import PATCH_KERNEL, PATCH_STRIDE, RGB, STAGES, Sam2Config

_PRODUCTS = 2  # of a pair of tokens: its score, and its part of the output


class KernelWork(NamedTuple):
    """FLOPs of kernels that multiply.

    Attributes:
      useful: Those of pairs of tokens that may attend to each other.
      executed: Those of all pairs in the blocks that are visited, with heads padded to whole registers.
    """

    useful: float
    executed: float

    def __add__(self, other: "KernelWork") -> "KernelWork":  # pyright: ignore[reportIncompatibleMethodOverride]
        return KernelWork(self.useful + other.useful, self.executed + other.executed)

    def __mul__(self, count: int) -> "KernelWork":  # pyright: ignore[reportIncompatibleMethodOverride]
        return KernelWork(self.useful * count, self.executed * count)


def encoder_flops(config: Sam2Config) -> int:
    """Returns the FLOPs of the products of the image encoder for an image, with those of padded windows."""
    hiera, number = config.hiera, 0
    side = config.image_size // PATCH_STRIDE
    macs = side**2 * PATCH_KERNEL**2 * RGB * hiera.widths[0]
    for stage in range(STAGES):
        for index in range(hiera.depths[stage]):
            first = index == 0 and stage > 0
            window = side if number in hiera.global_blocks else hiera.windows[stage - first]
            width, before = hiera.widths[stage], hiera.widths[stage - first]
            inside = round_up(side, window) ** 2  # cells in windows, those of padding included
            pooled, after = (inside // 4, side**2 // 4) if first else (inside, side**2)
            macs += side**2 * before * width * first  # the shortcut
            macs += inside * before * 3 * width + pooled * width**2
            macs += pooled * window**2 * 2 * width
            macs += after * 2 * width * hiera.mlp_width(stage)
            side //= 1 + first
            number += 1
        macs += side**2 * hiera.widths[stage] * config.width
    fine = (config.image_size // PATCH_STRIDE) ** 2
    macs += fine * config.width * config.width // 8 + fine // 4 * config.width * config.width // 4
    return 2 * macs


def encoder_kernel_work(config: Sam2Config, mesh: Mesh) -> KernelWork:
    """Returns the work of attention in windows and over whole maps, for an image."""
    hiera, total, number = config.hiera, KernelWork(0, 0), 0
    side = config.image_size // PATCH_STRIDE
    for stage in range(STAGES):
        for index in range(hiera.depths[stage]):
            first = index == 0 and stage > 0
            window = side if number in hiera.global_blocks else hiera.windows[stage - first]
            windows, cells = (round_up(side, window) // window) ** 2, window**2
            queries = cells // 4 if first else cells
            joined = joined_windows(windows, queries)
            row = window_numbers(joined, queries), window_numbers(joined, cells)
            heads = hiera.heads[stage]
            total += _work(mesh, heads, hiera.widths[stage] // heads, row) * (windows // joined)
            side, number = side >> first, number + 1
    return total


def memory_kernel_work(config: Sam2Config, mesh: Mesh, conditioning: int) -> KernelWork:
    """Returns the work of the memory attention, with the projections of its heads, for an object whose memory is full.

    Args:
      config: The model.
      mesh: Mesh whose devices decide the sizes of blocks.
      conditioning: Conditioning frames of the object.
    """
    cells = config.grid**2
    maps = conditioning + config.num_memories - 1
    pointers = conditioning + config.num_pointers - 1
    queries = np.ones(cells, np.int32)
    keys = np.ones(maps * cells + pointers * config.tokens_per_pointer, np.int32)
    heads, width = config.memory_heads, config.width // config.memory_heads
    work = _work(mesh, heads, width, (queries, queries)) + _work(mesh, heads, width, (queries, keys))
    own = 8 * cells * config.width**2  # the queries of both, keys and values of the features
    of_token = 4 * config.width  # its key and its value, for each of its channels
    useful = own + len(keys) * of_token * config.memory_width
    executed = own + padded_tokens(len(keys)) * of_token * round_up(config.memory_width, LANES)
    return (work + KernelWork(useful, executed)) * config.memory_layers


def _work(mesh: Mesh, heads: int, width: int, row: tuple[np.ndarray, np.ndarray]) -> KernelWork:
    """Returns the work of attention in one row, of which the segments of queries and keys are given."""
    flops = 2 * _PRODUCTS * heads
    queries, keys = (np.bincount(side) for side in row)
    visited = visited_pairs(mesh, row, (heads, heads), width, causal=False)
    return KernelWork(flops * width * int(queries @ keys), flops * round_up(width, LANES) * visited)
