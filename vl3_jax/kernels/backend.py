"""The interface of blockwise attention implementations, and its derivative.

A backend returns the log-sum-exp of the scores besides its output, and takes both in its backward pass. Attention over
one part of the keys can therefore be merged with attention over another part, as `vl3_jax.kernels.ring` does.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from vl3_jax.kernels.segment_info import SegmentInfo


class Backend(NamedTuple):
    """An implementation of attention and its gradient.

    Dimension names: B rows, L queries, S keys, H query heads, K key/value heads, D channels of a head.

    Attributes:
      forward: (q [B, L, H, D], k and v [B, S, K, D], q_info, kv_info, *, causal, scale, dtype) -> out [B, L, H, D] of
        `dtype` and lse [B, L, H] float32, the log-sum-exp of scale * q k^T. For a query that attends to nothing, out
        is 0 and lse is `MASKED`.
      backward: (q, k, v, q_info, kv_info, out, lse, d_out, *, causal, scale, dtype) -> gradients of q, k and v, of
        `dtype`. Where the keys are only a part of all keys, out and lse are those of all keys.
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
    """Runs a backend, differentiable through its own backward pass.

    Args:
      backend: Implementation to run.
      q: Queries, [B, L, H, D].
      k: Keys, [B, S, K, D].
      v: Values, [B, S, K, D].
      q_info: Segments and positions of the queries, [B, L].
      kv_info: Segments and positions of the keys, [B, S].
      causal: Whether a query attends only to keys at its own or earlier positions.
      scale: Factor of the scores.

    Returns:
      The attention output, [B, L, H, D] in the dtype of `q`.
    """
    return _forward(backend, q, k, v, q_info, kv_info, causal, scale)[0]


def _forward(backend, q, k, v, q_info, kv_info, causal, scale):
    operands = (q, k, v, q_info, kv_info)
    out, lse = backend.forward(*operands, causal=causal, scale=scale, dtype=q.dtype)
    return out, (*operands, out, lse)


def _backward(backend, causal, scale, residuals, d_out):
    gradients = backend.backward(*residuals, d_out, causal=causal, scale=scale, dtype=d_out.dtype)
    return (*gradients, None, None)


attend.defvjp(_forward, _backward)
