"""The operands of attention, the interface of its blockwise implementations, and their derivative.

A backend returns the log-sum-exp of the scores besides its output, and takes both in its backward pass. Attention over
one part of the keys can therefore be merged with attention over another part, as `vl3_jax.kernels.ring` does.

Dimension names: B rows, L queries, S keys, H query heads, K key/value heads, D channels of a head.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
from jax.ad_checkpoint import checkpoint_name

from vl3_jax.kernels.rotary import rotate
from vl3_jax.kernels.segment_info import SegmentInfo


class AttentionInputs(flax.struct.PyTreeNode):
    """The operands of attention: softmax(scale * q k^T) v within equal segments.

    It is a pytree of the arrays; `causal` and `scale` are static.

    Attributes:
      q: Queries, [B, L, H, D].
      k: Keys, [B, S, K, D], where K divides H (grouped-query attention).
      v: Values, of the same shape as `k`.
      q_info: Segments and positions of the queries, [B, L], in any order. A query of segment 0 attends to nothing and
        gives zeros.
      kv_info: Segments and positions of the keys, [B, S], in any order. Nothing attends to a key of segment 0.
      causal: Whether a query attends only to keys whose position is not later than its own.
      scale: Factor of the scores.
      rotary: Rotary table, [B, L, D] float32, by which queries and keys of the same tokens are rotated before
        (`vl3_jax.kernels.rotary`); None leaves them as they are.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    q_info: SegmentInfo
    kv_info: SegmentInfo
    causal: bool = flax.struct.field(pytree_node=False, kw_only=True)
    scale: float = flax.struct.field(pytree_node=False, kw_only=True)
    rotary: jax.Array | None = flax.struct.field(default=None, kw_only=True)

    def rotated(self) -> "AttentionInputs":
        """Returns the operands with rotated queries and keys, and without a rotary table."""
        if self.rotary is None:
            return self
        return self.replace(q=rotate(self.q, self.rotary), k=rotate(self.k, self.rotary), rotary=None)


class Backend(NamedTuple):
    """An implementation of attention and its gradient.

    Attributes:
      forward: (inputs, *, dtype) -> out [B, L, H, D] of `dtype` and lse [B, L, H] float32, the log-sum-exp of
        scale * q k^T. For a query that attends to nothing, out is 0 and lse is `MASKED`.
      backward: (inputs, out, lse, d_out, *, dtype) -> gradients of q, k and v, of `dtype`. Where the keys are only a
        part of all keys, out and lse are those of all keys.
      rotates: Whether both rotate queries and keys themselves, and `backward` their gradients back. Other backends are
        called with `inputs.rotated()`.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    rotates: bool = False


def attend(backend: Backend, inputs: AttentionInputs) -> jax.Array:
    """Runs a backend, differentiable through its own backward pass.

    Args:
      backend: Implementation to run.
      inputs: Operands of attention.

    Returns:
      The attention output, [B, L, H, D] in the dtype of `q`; zeros for a query without allowed keys.
    """
    return _attend(backend, inputs if backend.rotates else inputs.rotated())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(backend: Backend, inputs: AttentionInputs) -> jax.Array:
    return _forward(backend, inputs)[0]


def _forward(backend, inputs):
    out, lse = (checkpoint_name(x, "attention") for x in backend.forward(inputs, dtype=inputs.q.dtype))
    return out, (inputs, out, lse)


def _backward(backend, residuals, d_out):
    d_q, d_k, d_v = backend.backward(*residuals, d_out, dtype=d_out.dtype)
    return (residuals[0].replace(q=d_q, k=d_k, v=d_v, q_info=None, kv_info=None, rotary=None),)


_attend.defvjp(_forward, _backward)
