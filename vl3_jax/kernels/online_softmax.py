"""The softmax of scores that come block by block: what is known so far, and how one more block changes it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.segment_info import MASKED


class OnlineSoftmaxState(NamedTuple):
    """Of the keys seen so far, for queries [..., D], all float32."""

    peak: jax.Array  # [..., 1], the largest score
    total: jax.Array  # [..., 1], sum of exp(score - peak)
    out: jax.Array  # [..., D], the values weighted by exp(score - peak)


def init(shape: tuple[int, ...]) -> OnlineSoftmaxState:
    """Before the first key, for queries of `shape`."""
    one = (*shape[:-1], 1)
    return OnlineSoftmaxState(
        jnp.full(one, MASKED, jnp.float32), jnp.zeros(one, jnp.float32), jnp.zeros(shape, jnp.float32)
    )


def update(
    state: OnlineSoftmaxState, scores: jax.Array, allowed: jax.Array, values: jax.Array, equation: str
) -> OnlineSoftmaxState:
    """Adds a block of keys.

    Args:
      state: what came before.
      scores: [..., keys] float32; allowed: bool, which of them count.
      values: of these keys; `equation` is the product of weights [..., keys] and values to [..., D].
    """
    peak = jnp.maximum(state.peak, jnp.where(allowed, scores, MASKED).max(-1, keepdims=True))
    weights = jnp.where(allowed, jnp.exp(scores - peak), 0.0)
    shrink = jnp.exp(state.peak - peak)
    out = einsum(equation, weights.astype(values.dtype), values, out_dtype=jnp.float32)
    return OnlineSoftmaxState(peak, state.total * shrink + weights.sum(-1, keepdims=True), state.out * shrink + out)


def finalize(state: OnlineSoftmaxState) -> tuple[jax.Array, jax.Array]:
    """The output [..., D], zeros where no key was allowed, and the logarithm [..., 1] of the sum of exp(score)."""
    total = jnp.where(state.total == 0.0, 1.0, state.total)
    return state.out / total, state.peak + jnp.log(total)
