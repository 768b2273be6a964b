"""Arithmetic that the TPU attention kernels execute over a training step, of which the compiler gives no estimate.

A kernel multiplies whole blocks of queries and keys, and heads padded to the lanes of a register, wherever a block may
hold an allowed pair.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vl3_jax.kernels.backend import AttentionInputs
from vl3_jax.kernels.block_sizes import LANES, tpu_blocks
from vl3_jax.kernels.segment_info import SegmentInfo, active_blocks, pad_to_blocks, round_up
from vl3_jax.model import ModelConfig

# Products of a block of queries and a block of keys: scores and output; in the backward pass scores, gradient of the
# probabilities and of the queries in one kernel, and the first two again with those of keys and values in another.
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = 2, 7


def kernel_flops(
    config: ModelConfig,
    mesh: Mesh,
    frames: np.ndarray,
    samples: np.ndarray,
    trainable: Mapping[str, bool],
    remat: Mapping[str, str],
) -> dict[str, float]:
    """Computes the FLOPs that the kernels execute over a row, by scope of `program_cost`.

    Args:
      config: Sizes of the model.
      mesh: Mesh whose devices decide the sizes of blocks.
      frames: Frame of each patch of the row, [N] int32; 0 = padding.
      samples: Sample of each token of the row, [L] int32; 0 = padding.
      trainable: Whether gradients pass through the layers of "vision" and "text".
      remat: Remat policies of the layers of "vision" and "text".
    """
    vision, text = config.vision, config.text
    towers = {
        "tower attention": ("vision", vision.num_layers, vision.num_heads, vision.num_heads, vision.head_dim, frames),
        "decoder attention": ("text", text.num_layers, text.num_heads, text.num_kv_heads, text.head_dim, samples),
    }
    work = {}
    for scope, (name, layers, heads, kv_heads, width, segments) in towers.items():
        pairs = visited_pairs(mesh, (segments, segments), (heads, kv_heads), width, causal=name == "text")
        forwards = 1 + (trainable[name] and remat[name] == "full")
        products = forwards * _FORWARD_PRODUCTS + trainable[name] * _BACKWARD_PRODUCTS
        work[scope] = float(layers * heads * products * 2 * pairs * round_up(width, LANES))
    return work


def visited_pairs(
    mesh: Mesh, segments: tuple[np.ndarray, np.ndarray], heads: tuple[int, int], width: int, causal: bool
) -> int:
    """Returns the number of pairs of tokens in the blocks that a kernel visits.

    Args:
      mesh: Mesh whose devices decide the sizes of blocks.
      segments: Segments of the queries and of the keys of a row, [L] and [S] int32; 0 = padding.
      heads: Number of query heads and of key/value heads.
      width: Channels of a head.
      causal: Whether attention is causal.
    """
    infos = [_segment_info(side) for side in segments]
    q, kv = (
        jax.ShapeDtypeStruct((1, len(side), count, width), jnp.bfloat16)
        for side, count in zip(segments, heads, strict=True)
    )
    inputs = AttentionInputs(q, kv, kv, *infos, causal=causal, scale=1.0)  # pyright: ignore[reportArgumentType]
    with jax.set_mesh(mesh):
        blocks = tpu_blocks(inputs)
    if blocks is None:
        return len(segments[0]) * len(segments[1])
    sides = (pad_to_blocks(info, size) for info, size in zip(infos, (blocks.q, blocks.kv), strict=True))
    return int(active_blocks(*sides, blocks.q, blocks.kv, causal).sum()) * blocks.q * blocks.kv


def _segment_info(segments: np.ndarray) -> SegmentInfo:
    index = np.arange(len(segments))
    positions = index - np.maximum.accumulate(np.where(np.diff(segments, prepend=0) != 0, index, 0))
    return SegmentInfo(jnp.asarray(segments[None]), jnp.asarray(positions[None], jnp.int32))
