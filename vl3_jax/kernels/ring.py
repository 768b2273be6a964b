"""Attention over positions that are split between devices: keys and values go round in a ring (arXiv 2310.01889).

Each device keeps its slice of the queries. The slices of keys and values pass from device to device, and what each
of them adds is merged by the logarithms of the softmax's denominators, so no device ever holds more than a slice of
its own and one of another. In the backward pass the gradients of keys and values travel with them and are home after
a full round. A device that shares no segment with a visiting slice passes it on without work.
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
    """Same contract as `blockwise_attention`, called inside a `shard_map` for one device's slices.

    Args:
      q, k, v, q_info, kv_info: slices of equal size along the mesh axis `axis`, in any order.
      causal, scale: as on one device.
      axis: the mesh axis that splits positions.
      local: attention of one slice to another.

    Returns:
      The slice of the output that belongs to q.
    """
    return attend(ring_backend(local, axis), q, k, v, q_info, kv_info, causal, scale)


@functools.cache
def ring_backend(local: Backend, axis: str) -> Backend:
    """`local` over all slices along `axis`."""
    return Backend(
        functools.partial(_forward, local=local, axis=axis), functools.partial(_backward, local=local, axis=axis)
    )


def _pass_on(arrays, axis):
    """To the next device of the ring."""
    size = lax.axis_size(axis)
    return lax.ppermute(arrays, axis, [(i, (i + 1) % size) for i in range(size)])


def _share(q_info, kv_info, causal):
    """Whether two slices may hold an allowed pair, by their bounds."""
    return active_blocks(q_info, kv_info, q_info.segment_ids.shape[1], kv_info.segment_ids.shape[1], causal).any()


def _forward(q, k, v, q_info, kv_info, *, causal, scale, dtype, local, axis):
    def visit(slices, state):
        def add():
            k, v, kv_info = slices
            part = local.forward(q, k, v, q_info, kv_info, causal=causal, scale=scale, dtype=jnp.float32)
            return _merge(state, part)

        return lax.cond(_share(q_info, slices[2], causal), add, lambda: state)

    def hop(_, carry):
        slices, state = carry
        return _pass_on(slices, axis), visit(slices, state)

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], MASKED, jnp.float32)
    slices, state = lax.fori_loop(0, lax.axis_size(axis) - 1, hop, ((k, v, kv_info), nothing))
    out, lse = visit(slices, state)
    return out.astype(dtype), lse


def _merge(ours, theirs):
    """Attention to the keys of both, from output and lse over the keys of each."""
    (out, lse), (other_out, other_log_total) = ours, theirs
    merged = jnp.logaddexp(lse, other_log_total)
    weight, other_weight = (jnp.exp(x - merged)[..., None] for x in (lse, other_log_total))
    return out * weight + other_out * other_weight, merged


def _backward(q, k, v, q_info, kv_info, out, lse, d_out, *, causal, scale, dtype, local, axis):
    def visit(slices, state):
        def add():
            operands = (q, *slices[:2], q_info, slices[2], out, lse, d_out)
            part = local.backward(*operands, causal=causal, scale=scale, dtype=jnp.float32)
            return jax.tree.map(jnp.add, state, part)

        return lax.cond(_share(q_info, slices[2], causal), add, lambda: state)

    def hop(_, carry):
        slices, state = carry
        d_q, *d_slices = visit(slices, state)
        return _pass_on(slices, axis), (d_q, *_pass_on(d_slices, axis))

    nothing = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    slices, state = lax.fori_loop(0, lax.axis_size(axis) - 1, hop, ((k, v, kv_info), nothing))
    d_q, *d_slices = visit(slices, state)
    return tuple(x.astype(dtype) for x in (d_q, *_pass_on(d_slices, axis)))
