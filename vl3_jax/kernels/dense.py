"""Attention as two matrix products with all scores in memory: the reference, and the fastest for a few queries."""

import jax
import jax.numpy as jnp

from vl3_jax.kernels.backend import AttentionInputs
from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.segment_info import MASKED, allowed_pairs


def dense_attention(inputs: AttentionInputs) -> jax.Array:
    """Computes attention, [B, L, H, D] in the dtype of `q`, with all [B, H, L, S] scores in memory at once."""
    allowed = allowed_pairs(inputs.q_info, inputs.kv_info, inputs.causal)
    return masked_attention(inputs.q, inputs.k.swapaxes(1, 2), inputs.v.swapaxes(1, 2), allowed, inputs.scale)


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array, scale: float) -> jax.Array:
    """Computes attention where a mask allows it.

    Args:
      q: Queries, [B, L, H, D].
      k: Keys, heads first, [B, K, S, D].
      v: Values, likewise.
      allowed: Which queries attend to which keys, [B, L, S] bool.
      scale: Factor of the scores.

    Returns:
      The attention output, [B, L, H, D] in the dtype of `q`.
    """
    grouped_q = q.reshape(*q.shape[:2], k.shape[1], -1, q.shape[3])
    scores = einsum("blkgd,bksd->bkgls", grouped_q, k, out_dtype=jnp.float32) * scale
    allowed = allowed[:, None, None]
    row_max = jnp.max(scores, axis=-1, keepdims=True, where=allowed, initial=MASKED)
    weights = jnp.exp(jnp.where(allowed, scores - jax.lax.stop_gradient(row_max), MASKED))
    row_sum = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(row_sum == 0.0, 1.0, row_sum)
    return einsum("bkgls,bksd->blkgd", weights.astype(v.dtype), v).reshape(q.shape)
