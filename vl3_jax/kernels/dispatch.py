"""Which attention runs: by platform, shape and type, known when the program is traced."""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vl3_jax.kernels.backend import Backend, attend
from vl3_jax.kernels.blockwise import BLOCKWISE
from vl3_jax.kernels.blockwise_decode import blockwise_decode_attention
from vl3_jax.kernels.dense import dense_attention
from vl3_jax.kernels.gpu_attention import gpu_backend, gpu_unsupported_reason
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.kernels.tpu_attention import tpu_backend, tpu_unsupported_reason
from vl3_jax.kernels.tpu_decode import tpu_decode_attention, tpu_decode_unsupported_reason
from vl3_jax.parallel.rules import target_device

# Up to this many queries the scores are no larger than a few keys' worth of activations.
FEW_QUERIES = 16

logger = logging.getLogger(__name__)


class Kernel(NamedTuple):
    """Attention for one platform.

    Attributes:
      backend: makes it.
      refusal: (q, k, v, causal) -> why it does not take these operands, in a few words, or None.
    """

    backend: Callable[[], Backend]
    unsupported_reason: Callable[[jax.Array, jax.Array, jax.Array, bool], str | None]


# By platform. What has none, or is refused, runs in plain JAX.
KERNELS = {"tpu": Kernel(tpu_backend, tpu_unsupported_reason), "gpu": Kernel(gpu_backend, gpu_unsupported_reason)}


def select_backend(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> Backend:
    """Attention in blocks for q [B, L, H, D] and k, v [B, S, K, D] on the device that the trace is for.

    A kernel that there is but that cannot be used is mentioned in the log, once for each reason.
    """
    platform = target_device().platform
    if platform not in KERNELS:
        return BLOCKWISE
    unsupported_reason = KERNELS[platform].unsupported_reason(q, k, v, causal)
    if unsupported_reason:
        _mention(platform, unsupported_reason)
        return BLOCKWISE
    return KERNELS[platform].backend()


@functools.cache
def _mention(platform: str, unsupported_reason: str) -> None:
    logger.warning("attention in plain JAX, for the %s kernel does not take %s", platform, unsupported_reason)


def local_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_info: SegmentInfo,
    kv_info: SegmentInfo,
    *,
    causal: bool,
    scale: float,
    backend: Backend | None = None,
) -> jax.Array:
    """Same contract as `blockwise_attention`, of all keys on one device; dense for a few queries.

    `backend` is used whatever the shape and the platform are.
    """
    if backend is None and q.shape[1] <= FEW_QUERIES:
        return dense_attention(q, k, v, q_info, kv_info, causal=causal, scale=scale)
    return attend(backend or select_backend(q, k, v, causal), q, k, v, q_info, kv_info, causal, scale)


def decode_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array,
    q_info: SegmentInfo,
    kv_info: SegmentInfo,
    *,
    causal: bool,
    scale: float,
) -> jax.Array:
    """Attention of q [B, L, H, D], L small, to one layer of a cache [layers, B, S, K, D], read in place if possible."""
    operands, setting = (q_info, kv_info), {"causal": causal, "scale": scale}
    platform = target_device().platform
    if platform == "tpu":
        unsupported_reason = tpu_decode_unsupported_reason(q, keys)
        if unsupported_reason is None:
            return tpu_decode_attention(q, keys, values, layer, *operands, **setting)
        _mention(platform, unsupported_reason)
    # On a GPU, each turn of a loop of unknown length waits for the host. To slice bfloat16, XLA on a CPU converts all
    # layers to float32 first.
    if platform == "cpu" and keys.dtype == jnp.float32:
        return blockwise_decode_attention(q, keys, values, layer, *operands, **setting)
    k, v = (x[layer].astype(q.dtype) for x in (keys, values))
    return dense_attention(q, k, v, *operands, **setting)
