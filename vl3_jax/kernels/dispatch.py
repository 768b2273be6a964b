"""Selects the attention implementation by platform, shape and dtype when a program is traced."""

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

# Up to this many queries, the scores are no larger than the activations of a few keys.
FEW_QUERIES = 16

logger = logging.getLogger(__name__)


class Kernel(NamedTuple):
    """The attention kernels of one platform.

    Attributes:
      backend: Returns the backend.
      unsupported_reason: (q, k, v, causal) -> why the kernels do not support these operands, in a few words; None if
        they do.
    """

    backend: Callable[[], Backend]
    unsupported_reason: Callable[[jax.Array, jax.Array, jax.Array, bool], str | None]


# By platform. Platforms without kernels, and unsupported operands, use plain JAX.
KERNELS = {"tpu": Kernel(tpu_backend, tpu_unsupported_reason), "gpu": Kernel(gpu_backend, gpu_unsupported_reason)}


def select_backend(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> Backend:
    """Selects the blockwise backend for the device that the current trace is compiled for.

    A warning is logged, once for each reason, where the platform has kernels that do not support the operands.

    Args:
      q: Queries, [B, L, H, D].
      k: Keys, [B, S, K, D].
      v: Values, [B, S, K, D].
      causal: Whether attention is causal.

    Returns:
      The kernels of the platform if they support the operands, else plain JAX.
    """
    platform = target_device().platform
    if platform not in KERNELS:
        return BLOCKWISE
    unsupported_reason = KERNELS[platform].unsupported_reason(q, k, v, causal)
    if unsupported_reason:
        _warn_once(platform, unsupported_reason)
        return BLOCKWISE
    return KERNELS[platform].backend()


@functools.cache
def _warn_once(platform: str, unsupported_reason: str) -> None:
    logger.warning("using attention in plain JAX: the %s kernel does not support %s", platform, unsupported_reason)


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
    """Equals `blockwise_attention` for keys that are all on one device; dense for a few queries.

    Args:
      q: Queries, [B, L, H, D].
      k: Keys, [B, S, K, D].
      v: Values, [B, S, K, D].
      q_info: Segments and positions of the queries, [B, L].
      kv_info: Segments and positions of the keys, [B, S].
      causal: Whether a query attends only to keys at its own or earlier positions.
      scale: Factor of the scores.
      backend: Backend to use whatever the shape and the platform; None selects one.

    Returns:
      The attention output, [B, L, H, D] in the dtype of `q`.
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
    """Attention of a few queries to one layer of a cache, which is read in place where the platform allows it.

    The arguments and the result are those of `blockwise_decode_attention`.
    """
    info, options = (q_info, kv_info), {"causal": causal, "scale": scale}
    platform = target_device().platform
    if platform == "tpu":
        unsupported_reason = tpu_decode_unsupported_reason(q, keys)
        if unsupported_reason is None:
            return tpu_decode_attention(q, keys, values, layer, *info, **options)
        _warn_once(platform, unsupported_reason)
    # On a GPU, each iteration of a loop of unknown length waits for the host. On a CPU, XLA converts all layers of a
    # bfloat16 cache to float32 before it slices them.
    if platform == "cpu" and keys.dtype == jnp.float32:
        return blockwise_decode_attention(q, keys, values, layer, *info, **options)
    k, v = (x[layer].astype(q.dtype) for x in (keys, values))
    return dense_attention(q, k, v, *info, **options)
