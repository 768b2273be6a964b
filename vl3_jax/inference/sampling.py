"""Sampling of the next token as transformers' generation does it, in one jitted function for every setting."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vl3_jax.inference.sampling_config import SamplingConfig


class SamplingParams(NamedTuple):
    """The settings that may change without recompilation, as scalars on the device."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    repetition_penalty: jax.Array

    @classmethod
    def of(cls, config: SamplingConfig) -> "SamplingParams":
        """Takes the scalars from a `SamplingConfig`."""
        return cls(
            jnp.float32(config.temperature),
            jnp.int32(config.top_k),
            jnp.float32(config.top_p),
            jnp.float32(config.repetition_penalty),
        )


def sample_token(logits: jax.Array, generated: jax.Array, key: jax.Array, sampling_params: SamplingParams) -> jax.Array:
    """Chooses the next token of each row.

    Args:
      logits: [B, V] float32.
      generated: [B, V] bool, the tokens that each row has generated before.
      key: Random key of this step.
      sampling_params: Temperature, top-k, top-p and repetition penalty.

    Returns:
      [B] int32, token ids.
    """
    penalty = sampling_params.repetition_penalty
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(generated, penalised, logits)
    return jax.lax.cond(
        sampling_params.temperature > 0,
        lambda: _sample(logits, key, sampling_params),
        lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
    )


def _sample(logits: jax.Array, key: jax.Array, sampling_params: SamplingParams) -> jax.Array:
    """Applies temperature, then top-k, then top-p to the sorted logits, and samples from what is left."""
    vocab_size = logits.shape[-1]
    order = jnp.argsort(-logits, axis=-1, stable=True)
    sorted_logits = jnp.take_along_axis(logits, order, axis=-1) / sampling_params.temperature
    top_k = jnp.where(sampling_params.top_k > 0, sampling_params.top_k, vocab_size)
    sorted_logits = jnp.where(jnp.arange(vocab_size) < top_k, sorted_logits, -jnp.inf)
    probabilities = jax.nn.softmax(sorted_logits, axis=-1)
    preceding = jnp.cumsum(probabilities, axis=-1) - probabilities
    in_top_p = (preceding < sampling_params.top_p) | (jnp.arange(vocab_size) == 0)
    sorted_logits = jnp.where(in_top_p, sorted_logits, -jnp.inf)
    rank = jax.random.categorical(key, sorted_logits, axis=-1)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
