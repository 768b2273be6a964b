"""Inputs for attention tests, and the exact result of attention in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from vl3_jax.kernels.segment_info import SegmentInfo


def exact_attention(q, k, v, q_info, kv_info, causal):
    """Computes attention by its definition in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    scores = np.einsum("blhd,bshd->bhls", q, k) * q.shape[-1] ** -0.5
    allowed = (q_info.segment_ids[:, :, None] == kv_info.segment_ids[:, None]) & (q_info.segment_ids[:, :, None] > 0)
    if causal:
        allowed &= kv_info.positions[:, None] <= q_info.positions[:, :, None]
    scores = np.where(allowed[:, None], scores, -np.inf)
    row_max = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(row_max), row_max, 0))
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bhls,bshd->blhd", weights, v)


def make_segment_info(lengths: list[int], size: int, padding_first: bool = False) -> SegmentInfo:
    """Returns one row with segments of these lengths, truncated to `size`, with padding at one end."""
    segment_ids = np.concatenate([np.full(n, i) for i, n in enumerate(lengths, 1)] or [[]])[:size].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths] or [[]])[:size].astype(np.int32)
    padding = (size - len(segment_ids), 0) if padding_first else (0, size - len(segment_ids))
    return SegmentInfo(np.pad(segment_ids, padding)[None], np.pad(positions, padding)[None])


def stack_rows(*rows: SegmentInfo) -> SegmentInfo:
    """Stacks rows into a batch."""
    return SegmentInfo(*(np.concatenate(arrays) for arrays in zip(*rows, strict=True)))


def random_qkv(rows, length, kv_length, heads, kv_heads, width, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (rows, length, heads, width))
    return q, *(jax.random.normal(key, (rows, kv_length, kv_heads, width)) for key in keys[1:])


@functools.partial(jax.jit, static_argnames=("attention", "causal"))
def value_and_gradients(attention, q, k, v, q_info, kv_info, causal):
    """Returns the output of an attention function, and the gradients of q, k and v for a fixed weighting of it."""
    scale = q.shape[-1] ** -0.5

    def loss(q, k, v):
        out = attention(q, k, v, q_info, kv_info, causal=causal, scale=scale)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, gradients
