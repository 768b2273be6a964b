"""Attention as two matrix products with all scores between: the reference, and right for a few queries."""

import jax
import jax.numpy as jnp

from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.labels import MASKED, Labels


def dense_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, q_labels: Labels, kv_labels: Labels, *, causal: bool, scale: float
) -> jax.Array:
    """Same contract as `blockwise_attention`, with all [B, H, L, S] scores at once."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = einsum("blkgd,bskd->bkgls", grouped, k, out_dtype=jnp.float32) * scale
    allowed = (q_labels.segment[:, :, None] == kv_labels.segment[:, None]) & (q_labels.segment[:, :, None] > 0)
    if causal:
        allowed &= kv_labels.position[:, None] <= q_labels.position[:, :, None]
    allowed = allowed[:, None, None]
    peak = jnp.max(scores, axis=-1, keepdims=True, where=allowed, initial=MASKED)
    weights = jnp.exp(jnp.where(allowed, scores - jax.lax.stop_gradient(peak), MASKED))
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total == 0.0, 1.0, total)
    return einsum("bkgls,bskd->blkgd", weights.astype(v.dtype), v).reshape(q.shape)
