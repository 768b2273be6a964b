"""Online softmax: attention over keys that arrive block by block.

The functions have short names and are meant to be called through the module: `online_softmax.update(...)`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.segment_info import MASKED


class OnlineSoftmaxState(NamedTuple):
    """Running softmax of queries [..., D] over the keys processed before; all arrays are float32.

    Attributes:
      row_max: Largest score of each query, [..., 1].
      row_sum: Sum of exp(score - row_max), [..., 1].
      out: Values weighted by exp(score - row_max), [..., D].
    """

    row_max: jax.Array
    row_sum: jax.Array
    out: jax.Array


def init(shape: tuple[int, ...]) -> OnlineSoftmaxState:
    """Returns the state before the first block of keys.

    Args:
      shape: Shape of the queries, [..., D].
    """
    row_shape = (*shape[:-1], 1)
    return OnlineSoftmaxState(
        row_max=jnp.full(row_shape, MASKED, jnp.float32),
        row_sum=jnp.zeros(row_shape, jnp.float32),
        out=jnp.zeros(shape, jnp.float32),
    )


def update(
    state: OnlineSoftmaxState,
    scores: jax.Array,
    allowed: jax.Array,
    values: jax.Array,
    equation: str | None,
    value_scales: jax.Array | None = None,
) -> OnlineSoftmaxState:
    """Adds a block of keys.

    Args:
      state: State of the blocks before.
      scores: Scores of the keys, [..., keys] float32.
      allowed: Which keys each query attends to, bool in the shape of `scores`.
      values: Values of the keys.
      equation: Einsum of weights [..., keys] and `values` to [..., D]; None of one key, whose values broadcast to it.
      value_scales: By what the values of each key are multiplied, in a shape that broadcasts to that of `scores`; None
        leaves them as they are.

    Returns:
      The state with these keys.
    """
    row_max = jnp.maximum(state.row_max, jnp.where(allowed, scores, MASKED).max(-1, keepdims=True))
    weights = jnp.where(allowed, jnp.exp(scores - row_max), 0.0)
    correction = jnp.exp(state.row_max - row_max)
    scaled = weights if value_scales is None else weights * value_scales
    if equation is None:
        out = scaled * values.astype(jnp.float32)
    else:
        out = einsum(equation, scaled.astype(values.dtype), values, out_dtype=jnp.float32)
    return OnlineSoftmaxState(
        row_max=row_max,
        row_sum=state.row_sum * correction + weights.sum(-1, keepdims=True),
        out=state.out * correction + out,
    )


def finalize(state: OnlineSoftmaxState) -> tuple[jax.Array, jax.Array]:
    """Normalises the output after the last block of keys.

    Returns:
      The output [..., D], zeros for a query without allowed keys, and lse [..., 1], the log-sum-exp of the scores.
    """
    row_sum = jnp.where(state.row_sum == 0.0, 1.0, state.row_sum)
    return state.out / row_sum, state.row_max + jnp.log(row_sum)
