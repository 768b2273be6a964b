"""Sampling of the next token as transformers' generation does it, with settings of its own for each row.

No vocabulary is sorted: the tokens that top-k and top-p keep are those from a threshold on, which is found exactly by
bisection over the bits of a float. Where no row has a top-k or top-p, nothing of it runs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vl3_jax.inference.sampling_config import SamplingConfig

SAMPLING_DTYPES = (np.float32, np.int32, np.float32, np.float32, np.uint32)  # of the fields of `SamplingParams`
_SIGN = np.uint32(1 << 31)


class SamplingParams(NamedTuple):
    """The settings of R rows, [R] each; they may change without recompilation.

    Attributes:
      temperature: float32; 0 is greedy.
      top_k: int32; 0 keeps all tokens.
      top_p: float32; 1 keeps all tokens.
      repetition_penalty: float32; 1 is none.
      seed: uint32; with the position of a token it determines the token's random numbers, whatever the other rows do.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    repetition_penalty: Any
    seed: Any

    @classmethod
    def of(cls, rows: Sequence[SamplingConfig]) -> "SamplingParams":
        """Takes the values of each row from its `SamplingConfig`."""
        columns = zip(cls._fields, SAMPLING_DTYPES, strict=True)
        return cls(*(np.array([getattr(row, name) for row in rows], dtype) for name, dtype in columns))


def sample_tokens(
    logits: jax.Array,
    generated: jax.Array,
    positions: jax.Array,
    sampling_params: SamplingParams,
    all_greedy: bool = False,
    allowed: jax.Array | None = None,
) -> jax.Array:
    """Chooses the next token of each row.

    Args:
      logits: [R, V] float32.
      generated: [R, V] bool, the tokens that each row has generated before.
      positions: [R] int32, the position of the token that is chosen.
      sampling_params: Settings of each row.
      all_greedy: Whether no row has a temperature, which makes a smaller program.
      allowed: [R, V] bool, the tokens that each row may generate, at least one; None allows all.

    Returns:
      [R] int32, token ids.
    """
    penalty = sampling_params.repetition_penalty[:, None]
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(generated, penalised, logits)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if all_greedy:
        return greedy
    return jnp.where(sampling_params.temperature > 0, _sample(logits, positions, sampling_params), greedy)


def _sample(logits: jax.Array, positions: jax.Array, params: SamplingParams) -> jax.Array:
    """Applies temperature, then top-k, then top-p, and samples from what is left."""
    logits = logits / jnp.where(params.temperature > 0, params.temperature, 1)[:, None]
    logits = jax.lax.cond(jnp.any(params.top_k > 0), _keep_top_k, lambda x, _: x, logits, params.top_k)
    logits = jax.lax.cond(jnp.any(params.top_p < 1), _keep_top_p, lambda x, _: x, logits, params.top_p)

    def draw(row: jax.Array, seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), row)

    return jax.vmap(draw)(logits, params.seed, positions).astype(jnp.int32)


def _keep_top_k(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """Removes what is smaller than the k-th largest logit of its row; equal ones stay, as in transformers."""
    wanted = jnp.where(top_k > 0, jnp.minimum(top_k, logits.shape[-1]), logits.shape[-1])
    return _keep_from(logits, lambda is_kept: is_kept.sum(axis=-1) >= wanted)


def _keep_top_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Keeps the fewest tokens of each row, the most likely first, whose probability reaches p; equal ones stay."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    kept = _keep_from(logits, lambda is_kept: jnp.where(is_kept, probabilities, 0).sum(axis=-1) >= top_p)
    return jnp.where((top_p < 1)[:, None], kept, logits)


def _keep_from(logits: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Removes the logits below the largest threshold of each row at which `enough`, given what is kept, is true.

    At the lowest threshold, which keeps all, `enough` counts as true.
    """
    bits = jax.lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.uint32)  # -0.0 is 0.0
    order = jnp.where(bits < _SIGN, bits | _SIGN, ~bits)  # as integers in the order of the floats

    def set_bit(index: jax.Array, threshold: jax.Array) -> jax.Array:
        higher = threshold | (_SIGN >> index.astype(jnp.uint32))
        return jnp.where(enough(order >= higher[:, None]), higher, threshold)

    threshold = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(logits.shape[0], jnp.uint32))
    return jnp.where(order >= threshold[:, None], logits, -jnp.inf)
