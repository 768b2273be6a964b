"""Ring attention: attention over positions that are split between devices (arXiv 2310.01889).

Each device keeps its slice of the queries. The slices of keys and values rotate from device to device, and the outputs
over them are merged by their log-sum-exps, so no device ever holds more than its own slice and one other. In the
backward pass the gradients of keys and values rotate with them and are back at their owner after a full rotation. A
device skips the computation for a slice with which it shares no segment.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from vl3_jax.kernels.backend import Backend, attend
from vl3_jax.kernels.segment_info import MASKED, SegmentInfo, active_blocks


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_info: SegmentInfo,
    kv_info: SegmentInfo,
    *,
    causal: bool,
    scale: float,
    axis: str,
    local: Backend,
) -> jax.Array:
    """Equals `blockwise_attention` over all slices; called inside a `shard_map` with the slices of one device.

    Args:
      q: Slice of the queries, [B, L, H, D].
      k: Slice of the keys, [B, S, K, D], of equal size on all devices along `axis`.
      v: Slice of the values, [B, S, K, D].
      q_info: Segments and positions of this slice of queries, [B, L], in any order.
      kv_info: Segments and positions of this slice of keys, [B, S], in any order.
      causal: Whether a query attends only to keys at its own or earlier positions.
      scale: Factor of the scores.
      axis: Mesh axis over which positions are split.
      local: Backend for attention of one slice to another.

    Returns:
      The output of this slice of queries, [B, L, H, D] in the dtype of `q`.
    """
    return attend(ring_backend(local, axis), q, k, v, q_info, kv_info, causal, scale)


@functools.cache
def ring_backend(local: Backend, axis: str) -> Backend:
    """Returns a backend that runs `local` over all slices along the mesh axis `axis`."""
    return Backend(
        functools.partial(_forward, local=local, axis=axis), functools.partial(_backward, local=local, axis=axis)
    )


def _rotate(arrays, axis):
    """Sends arrays to the next device of the ring."""
    size = lax.axis_size(axis)
    return lax.ppermute(arrays, axis, [(i, (i + 1) % size) for i in range(size)])


def _may_attend(q_info, kv_info, causal):
    """Returns whether two slices may hold an allowed pair of tokens, by the bounds of their segments."""
    return active_blocks(q_info, kv_info, q_info.segment_ids.shape[1], kv_info.segment_ids.shape[1], causal).any()


def _forward(q, k, v, q_info, kv_info, *, causal, scale, dtype, local, axis):
    def add_slice(slices, state):
        def add():
            k, v, kv_info = slices
            part = local.forward(q, k, v, q_info, kv_info, causal=causal, scale=scale, dtype=jnp.float32)
            return _merge(state, part)

        return lax.cond(_may_attend(q_info, slices[2], causal), add, lambda: state)

    def ring_step(_, carry):
        slices, state = carry
        return _rotate(slices, axis), add_slice(slices, state)

    state = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], MASKED, jnp.float32)
    slices, state = lax.fori_loop(0, lax.axis_size(axis) - 1, ring_step, ((k, v, kv_info), state))
    out, lse = add_slice(slices, state)
    return out.astype(dtype), lse


def _merge(state, part):
    """Merges output and lse over some keys with those over other keys."""
    (out, lse), (part_out, part_lse) = state, part
    merged_lse = jnp.logaddexp(lse, part_lse)
    weight, part_weight = (jnp.exp(x - merged_lse)[..., None] for x in (lse, part_lse))
    return out * weight + part_out * part_weight, merged_lse


def _backward(q, k, v, q_info, kv_info, out, lse, d_out, *, causal, scale, dtype, local, axis):
    def add_slice(slices, gradients):
        def add():
            operands = (q, *slices[:2], q_info, slices[2], out, lse, d_out)
            part = local.backward(*operands, causal=causal, scale=scale, dtype=jnp.float32)
            return jax.tree.map(jnp.add, gradients, part)

        return lax.cond(_may_attend(q_info, slices[2], causal), add, lambda: gradients)

    def ring_step(_, carry):
        slices, gradients = carry
        d_q, *d_slices = add_slice(slices, gradients)
        return _rotate(slices, axis), (d_q, *_rotate(d_slices, axis))

    gradients = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    slices, gradients = lax.fori_loop(0, lax.axis_size(axis) - 1, ring_step, ((k, v, kv_info), gradients))
    d_q, *d_slices = add_slice(slices, gradients)
    return tuple(x.astype(dtype) for x in (d_q, *_rotate(d_slices, axis)))
