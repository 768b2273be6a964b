"""Selects the attention implementation by platform, shape and dtype when a program is traced."""

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vl3_jax.kernels.backend import AttentionInputs, Backend, attend
from vl3_jax.kernels.blockwise import BLOCKWISE
from vl3_jax.kernels.blockwise_decode import BLOCK, blockwise_decode_attention, dense_decode_attention
from vl3_jax.kernels.decode_inputs import DecodeInputs, DecodeOutputs, DecodeSchedule, decode_schedule
from vl3_jax.kernels.dense import dense_attention
from vl3_jax.kernels.keys_values import KeysValues
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.parallel.rules import target_device

# Up to this many queries, the scores are no larger than the activations of a few keys.
FEW_QUERIES = 16
_CPU_QUERIES = 256  # up to which blocks of a cache are read in place sooner than a copy of the layer is made

logger = logging.getLogger(__name__)


def _kernels(platform: str) -> tuple[Callable[[], Backend], Callable[[AttentionInputs], str | None]] | None:
    """Returns what makes a platform's backend, and what says in a few words why it does not support some operands.

    None stands for a platform without kernels. They are imported where they are used, because that takes a while.
    """
    if platform == "tpu":
        from vl3_jax.kernels.tpu_attention import tpu_backend, tpu_unsupported_reason

        return tpu_backend, tpu_unsupported_reason
    if platform == "gpu":
        from vl3_jax.kernels.gpu_attention import gpu_backend, gpu_unsupported_reason

        return gpu_backend, gpu_unsupported_reason
    return None


def select_backend(inputs: AttentionInputs) -> Backend:
    """Selects the blockwise backend for the device that the current trace is compiled for.

    A warning is logged, once for each reason, where the platform has kernels that do not support the operands.

    Args:
      inputs: Operands of attention, of which shapes and dtypes are read.

    Returns:
      The kernels of the platform if they support the operands, else plain JAX.
    """
    platform = target_device().platform
    kernels = _kernels(platform)
    if kernels is None:
        return BLOCKWISE
    make_backend, why_unsupported = kernels
    unsupported_reason = why_unsupported(inputs)
    if unsupported_reason:
        _warn_once(platform, unsupported_reason)
        return BLOCKWISE
    return make_backend()


@functools.cache
def _warn_once(platform: str, unsupported_reason: str) -> None:
    logger.warning("using attention in plain JAX: the %s kernel does not support %s", platform, unsupported_reason)


def local_attention(inputs: AttentionInputs, backend: Backend | None = None) -> jax.Array:
    """Attention to keys that are all on one device; dense for a few queries.

    Args:
      inputs: Operands of attention.
      backend: Backend to use whatever the shape and the platform; None selects one.

    Returns:
      The attention output, [B, L, H, D] in the dtype of `q`.
    """
    if backend is None and inputs.q.shape[1] <= FEW_QUERIES:
        return dense_attention(inputs.rotated())
    return attend(backend or select_backend(inputs), inputs)


def most_decode_queries(cached: KeysValues) -> int:
    """Returns the most queries of a row for which `decode_attention` is faster than attention to a copy of a layer."""
    return _CPU_QUERIES if _reads_blocks(cached) else FEW_QUERIES


def _reads_blocks(cached: KeysValues) -> bool:
    # On a GPU, each iteration of a loop of unknown length waits for the host. On a CPU, XLA converts all layers of a
    # bfloat16 cache to float32 before it slices them.
    return target_device().platform == "cpu" and cached.keys.dtype != jnp.bfloat16


def decode_schedule_for(q_info: SegmentInfo, kv_info: SegmentInfo, cached: KeysValues) -> DecodeSchedule:
    """Returns the schedule of `decode_attention`, with the blocks of the platform's implementation."""
    max_block = BLOCK
    if target_device().platform == "tpu":
        from vl3_jax.kernels.tpu_decode import tpu_decode_block

        max_block = tpu_decode_block(cached)
    return decode_schedule(q_info, kv_info, max_block)


def decode_attention(inputs: DecodeInputs) -> DecodeOutputs:
    """Attention of a few new tokens to themselves and to a layer of a cache, in place where the platform allows it."""
    platform = target_device().platform
    if platform == "tpu":
        from vl3_jax.kernels.tpu_decode import tpu_decode_attention, tpu_decode_unsupported_reason

        unsupported_reason = tpu_decode_unsupported_reason(inputs)
        if unsupported_reason is None:
            return tpu_decode_attention(inputs)
        _warn_once(platform, unsupported_reason)
    return (blockwise_decode_attention if _reads_blocks(inputs.keys_values) else dense_decode_attention)(inputs)
