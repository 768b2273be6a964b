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
from vl3_jax.kernels.labels import MASKED, Labels, active_blocks


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_labels: Labels,
    kv_labels: Labels,
    *,
    causal: bool,
    scale: float,
    axis: str,
    local: Backend,
) -> jax.Array:
    """Same contract as `blockwise_attention`, called inside a `shard_map` for one device's slices.

    Args:
      q, k, v, q_labels, kv_labels: slices of equal size along the mesh axis `axis`, in any order.
      causal, scale: as on one device.
      axis: the mesh axis that splits positions.
      local: attention of one slice to another.

    Returns:
      The slice of the output that belongs to q.
    """
    return attend(ring_backend(local, axis), q, k, v, q_labels, kv_labels, causal, scale)


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


def _share(q_labels, kv_labels, causal):
    """Whether two slices may hold an allowed pair, by their bounds."""
    return active_blocks(q_labels, kv_labels, q_labels.segment.shape[1], kv_labels.segment.shape[1], causal).any()


def _forward(q, k, v, q_labels, kv_labels, *, causal, scale, dtype, local, axis):
    def visit(slices, so_far):
        def add():
            k, v, kv_labels = slices
            part = local.forward(q, k, v, q_labels, kv_labels, causal=causal, scale=scale, dtype=jnp.float32)
            return _merge(so_far, part)

        return lax.cond(_share(q_labels, slices[2], causal), add, lambda: so_far)

    def hop(_, carry):
        slices, so_far = carry
        return _pass_on(slices, axis), visit(slices, so_far)

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], MASKED, jnp.float32)
    slices, so_far = lax.fori_loop(0, lax.axis_size(axis) - 1, hop, ((k, v, kv_labels), nothing))
    out, log_total = visit(slices, so_far)
    return out.astype(dtype), log_total


def _merge(ours, theirs):
    """Attention to the keys of both, from output and log_total over the keys of each."""
    (out, log_total), (other_out, other_log_total) = ours, theirs
    merged = jnp.logaddexp(log_total, other_log_total)
    weight, other_weight = (jnp.exp(x - merged)[..., None] for x in (log_total, other_log_total))
    return out * weight + other_out * other_weight, merged


def _backward(q, k, v, q_labels, kv_labels, out, log_total, d_out, *, causal, scale, dtype, local, axis):
    def visit(slices, so_far):
        def add():
            operands = (q, *slices[:2], q_labels, slices[2], out, log_total, d_out)
            part = local.backward(*operands, causal=causal, scale=scale, dtype=jnp.float32)
            return jax.tree.map(jnp.add, so_far, part)

        return lax.cond(_share(q_labels, slices[2], causal), add, lambda: so_far)

    def hop(_, carry):
        slices, so_far = carry
        d_q, *d_slices = visit(slices, so_far)
        return _pass_on(slices, axis), (d_q, *_pass_on(d_slices, axis))

    nothing = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    slices, so_far = lax.fori_loop(0, lax.axis_size(axis) - 1, hop, ((k, v, kv_labels), nothing))
    d_q, *d_slices = visit(slices, so_far)
    return tuple(x.astype(dtype) for x in (d_q, *_pass_on(d_slices, axis)))
