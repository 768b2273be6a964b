"""Sizes of blocks for the TPU kernels, by generation of TPU and kind of attention.

No entry was measured on a TPU. They follow from the compiler's own schedules for v5e and v6e: instruction bundles of a
visit times visits, over the three kernels, are within a tenth of the least among the blocks of 128 to 1024 tokens
that were tried, for packed frames of 256 to 1200 patches with 16 heads of 72 channels and for samples of 5,000 tokens
with 12 heads of 128 on 2. All compile within the VMEM that a kernel has by default: 16 MiB, 32 on v6e.
"""

from typing import NamedTuple

import jax

from vl3_jax.kernels.segment_info import round_up
from vl3_jax.parallel.rules import target_device

LANES = 128  # of a vector register: blocks are whole numbers of them


class BlockSizes(NamedTuple):
    """What one visit takes (`vl3_jax.kernels.tpu_kernels`).

    Attributes:
      q, kv: tokens of a block of queries and of keys.
      heads: key/value heads, each with all its query heads; divides their number.
      unroll: query heads whose instructions are scheduled together: while one waits for the matrix unit, the next
        computes.
    """

    q: int
    kv: int
    heads: int
    unroll: int


class TunedBlocks(NamedTuple):
    """Of a generation.

    Attributes:
      frames: without causality: short segments, of which a larger block would hold several.
      text: causal: long segments.
      most: query heads times queries times bytes of a channel that one visit may take. Their accumulators and double
        buffers fill VMEM, next to scores of 512 x 512.
    """

    frames: BlockSizes = BlockSizes(256, 256, 8, 4)
    text: BlockSizes = BlockSizes(512, 512, 1, 2)
    most: int = 8192


# By `device_kind`; others as v4, v5e and v5p, whose schedules hardly differ.
_TABLE = {"TPU v6 lite": TunedBlocks(frames=BlockSizes(256, 256, 16, 4), most=16_384)}


def tpu_blocks(q: jax.Array, k: jax.Array, causal: bool) -> BlockSizes | None:
    """For q [B, L, H, D] and k [B, S, K, D] on the TPU of the present trace; None if no block of queries fits."""
    entry = _TABLE.get(target_device().device_kind, TunedBlocks())
    blocks = entry.text if causal else entry.frames
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    most = entry.most // q.dtype.itemsize // group
    if most < LANES:
        return None
    q_block = _fit(q.shape[1], min(blocks.q, most // LANES * LANES))
    heads = max(n for n in range(1, blocks.heads + 1) if kv_heads % n == 0 and (n == 1 or n * q_block <= most))
    return BlockSizes(q_block, _fit(k.shape[1], blocks.kv), heads, min(blocks.unroll, heads * group))


def _fit(length: int, block: int) -> int:
    """The least block that cuts `length` into as few blocks as `block` does."""
    count = -(-length // block)
    return round_up(-(-length // count), LANES)
