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

from vl3_jax.kernels.backend import AttentionInputs, Backend
from vl3_jax.kernels.segment_info import MASKED, active_blocks


@functools.cache
def ring_backend(local: Backend, axis: str) -> Backend:
    """Returns a backend that runs `local` over all slices along a mesh axis.

    It is called inside a `shard_map` with the slices of one device.

    Args:
      local: Backend for attention of one slice to another.
      axis: Mesh axis over which positions are split; the slices of keys are of equal size on all devices along it.
    """
    return Backend(
        functools.partial(_forward, local=local, axis=axis), functools.partial(_backward, local=local, axis=axis)
    )


def _rotate(arrays, axis):
    """Sends arrays to the next device of the ring."""
    size = lax.axis_size(axis)
    return lax.ppermute(arrays, axis, [(i, (i + 1) % size) for i in range(size)])


def _add_slice(inputs: AttentionInputs, slices, total, add):
    """Returns add(total, inputs of these slices of keys), or `total` if no pair of tokens can be allowed.

    The bounds of the segments of both slices decide.
    """
    k, v, kv_info = slices
    q_length, kv_length = inputs.q_info.segment_ids.shape[1], kv_info.segment_ids.shape[1]
    active = active_blocks(inputs.q_info, kv_info, q_length, kv_length, inputs.causal)
    inputs = inputs.replace(k=k, v=v, kv_info=kv_info)
    return lax.cond(active.any(), lambda: add(total, inputs), lambda: total)


def _forward(inputs: AttentionInputs, *, dtype, local: Backend, axis: str):
    def add(state, inputs):
        return _merge(state, local.forward(inputs, dtype=jnp.float32))

    def ring_step(_, carry):
        slices, state = carry
        return _rotate(slices, axis), _add_slice(inputs, slices, state, add)

    state = jnp.zeros(inputs.q.shape, jnp.float32), jnp.full(inputs.q.shape[:3], MASKED, jnp.float32)
    start = (inputs.k, inputs.v, inputs.kv_info), state
    slices, state = lax.fori_loop(0, lax.axis_size(axis) - 1, ring_step, start)
    out, lse = _add_slice(inputs, slices, state, add)
    return out.astype(dtype), lse


def _merge(state, part):
    """Merges output and lse over some keys with those over other keys."""
    (out, lse), (part_out, part_lse) = state, part
    merged_lse = jnp.logaddexp(lse, part_lse)
    weight, part_weight = (jnp.exp(x - merged_lse)[..., None] for x in (lse, part_lse))
    return out * weight + part_out * part_weight, merged_lse


def _backward(inputs: AttentionInputs, out, lse, d_out, *, dtype, local: Backend, axis: str):
    def add(gradients, inputs):
        return jax.tree.map(jnp.add, gradients, local.backward(inputs, out, lse, d_out, dtype=jnp.float32))

    def ring_step(_, carry):
        slices, gradients = carry
        d_q, *d_slices = _add_slice(inputs, slices, gradients, add)
        return _rotate(slices, axis), (d_q, *_rotate(d_slices, axis))

    gradients = tuple(jnp.zeros(x.shape, jnp.float32) for x in (inputs.q, inputs.k, inputs.v))
    start = (inputs.k, inputs.v, inputs.kv_info), gradients
    slices, gradients = lax.fori_loop(0, lax.axis_size(axis) - 1, ring_step, start)
    d_q, *d_slices = _add_slice(inputs, slices, gradients, add)
    d_q, d_k, d_v = (x.astype(dtype) for x in (d_q, *_rotate(d_slices, axis)))
    return d_q, d_k, d_v
