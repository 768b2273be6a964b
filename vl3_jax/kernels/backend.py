"""What every kind of attention in blocks offers, and its derivative.

A backend gives, besides its output, the logarithm of each softmax's denominator, and takes it again in its backward
pass. So attention over one part of the keys is a result that can be merged with that over another part, as the ring
does (`vl3_jax.kernels.ring`).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from vl3_jax.kernels.segment_info import SegmentInfo


class Backend(NamedTuple):
    """Attention over some keys, and its gradient. B rows, L queries, S keys, H heads, K of them for keys, D channels.

    Attributes:
      forward: (q [B, L, H, D], k, v [B, S, K, D], q_info, kv_info, *, causal, scale, dtype) -> out [B, L, H, D] of
        `dtype` and lse [B, L, H] float32, the logarithm of sum(exp(scale * q k^T)); for a query that sees
        nothing, out is 0 and lse is `MASKED`.
      backward: (q, k, v, q_info, kv_info, out, lse, d_out, *, causal, scale, dtype) -> gradients of q, k, v
        of `dtype`. Where these keys are a part of all, out and lse are those of all.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 6, 7))
def attend(
    backend: Backend,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_info: SegmentInfo,
    kv_info: SegmentInfo,
    causal: bool,
    scale: float,
) -> jax.Array:
    """A backend's output in the type of q, differentiable by its own backward pass."""
    return _forward(backend, q, k, v, q_info, kv_info, causal, scale)[0]


def _forward(backend, q, k, v, q_info, kv_info, causal, scale):
    operands = (q, k, v, q_info, kv_info)
    out, lse = backend.forward(*operands, causal=causal, scale=scale, dtype=q.dtype)
    return out, (*operands, out, lse)


def _backward(backend, causal, scale, residuals, d_out):
    gradients = backend.backward(*residuals, d_out, causal=causal, scale=scale, dtype=d_out.dtype)
    return (*gradients, None, None)


attend.defvjp(_forward, _backward)
