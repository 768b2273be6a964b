"""Block sizes of the TPU kernels, by TPU generation and kind of attention.

No entry was measured on a TPU. They follow from the compiler's own schedules for v5e and v6e: the instruction bundles
of a pair of blocks times the number of pairs, over the three kernels, are within a tenth of the least among the tried
blocks of 128 to 1024 tokens, for packed frames of 256 to 1200 patches with 16 heads of 72 channels and for samples of
5,000 tokens with 12 query heads of 128 channels on 2 key/value heads. All compile within a kernel's default VMEM:
16 MiB, 32 on v6e.
"""

from typing import NamedTuple

from vl3_jax.kernels.backend import AttentionInputs
from vl3_jax.kernels.segment_info import round_up
from vl3_jax.parallel.rules import target_device

LANES = 128  # of a vector register; block sizes are multiples of it


class BlockSizes(NamedTuple):
    """Sizes of one grid step of the TPU kernels (`vl3_jax.kernels.tpu_kernels`).

    Attributes:
      q: Tokens in a block of queries.
      kv: Tokens in a block of keys.
      heads: Key/value heads of a step, each with all its query heads; divides the number of key/value heads.
      unroll: Query heads whose instructions are scheduled together: while one waits for the matrix unit, the next
        computes.
    """

    q: int
    kv: int
    heads: int
    unroll: int


class TunedBlockSizes(NamedTuple):
    """Block sizes of one TPU generation.

    Attributes:
      frames: For attention that is not causal, with short segments, of which a larger block would hold several.
      text: For causal attention, with long segments.
      wide: For heads of more than LANES channels, which are few and whose segments are long.
      max_q_bytes: Upper bound of query heads x queries x bytes of a channel in one step, for heads of LANES channels.
        Their accumulators and double buffers fill VMEM, next to scores of 512 x 512.
    """

    frames: BlockSizes = BlockSizes(256, 256, 8, 4)
    text: BlockSizes = BlockSizes(512, 512, 1, 2)
    wide: BlockSizes = BlockSizes(512, 512, 1, 1)
    max_q_bytes: int = 8192


# By `device_kind`. All others use the defaults of v4, v5e and v5p, whose schedules hardly differ.
_TUNED = {"TPU v6 lite": TunedBlockSizes(frames=BlockSizes(256, 256, 16, 4), max_q_bytes=16_384)}


def tpu_blocks(inputs: AttentionInputs) -> BlockSizes | None:
    """Chooses the block sizes for the TPU that the current trace is compiled for.

    Args:
      inputs: Operands of attention, of which shapes and dtypes are read.

    Returns:
      The block sizes, or None if no block of queries fits VMEM.
    """
    tuned = _TUNED.get(target_device().device_kind, TunedBlockSizes())
    registers = -(-inputs.q.shape[3] // LANES)  # that the channels of a head fill
    blocks = tuned.wide if registers > 1 else tuned.text if inputs.causal else tuned.frames
    kv_heads, group = inputs.k.shape[2], inputs.q.shape[2] // inputs.k.shape[2]
    max_queries = tuned.max_q_bytes // inputs.q.dtype.itemsize // group // registers
    if max_queries < LANES:
        return None
    q_block = _fit(inputs.q.shape[1], min(blocks.q, max_queries // LANES * LANES))
    heads = max(n for n in range(1, blocks.heads + 1) if kv_heads % n == 0 and (n == 1 or n * q_block <= max_queries))
    return BlockSizes(q_block, _fit(inputs.k.shape[1], blocks.kv), heads, min(blocks.unroll, heads * group))


def _fit(length: int, block: int) -> int:
    """Returns the smallest block size that splits `length` into as few blocks as `block` does."""
    count = -(-length // block)
    return round_up(-(-length // count), LANES)
