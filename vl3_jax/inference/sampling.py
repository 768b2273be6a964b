"""Choosing the next token, as transformers' generation does it, in one jitted function for every setting."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vl3_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How to decode. Greedy unless a temperature is given.

    Attributes:
      max_new_tokens: where to stop if no stop token comes.
      temperature: 0 takes the best token; above, logits are divided by it and sampled.
      top_k: keep the k best tokens; 0 keeps all.
      top_p: keep the smallest set of tokens whose probability reaches p.
      repetition_penalty: divides positive and multiplies negative logits of tokens generated before.
      seed: of the random numbers.
      logprobs: how many of the best log-probabilities to report per token (of the model's own distribution).
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logprobs: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise InputError(f"max new tokens is {self.max_new_tokens}: ask for at least 1")
        if self.temperature < 0:
            raise InputError(f"temperature is {self.temperature}: use 0 for greedy decoding or a positive number")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p is {self.top_p}: use a share above 0 and up to 1")
        if self.top_k < 0:
            raise InputError(f"top-k is {self.top_k}: use 0 for all tokens or a positive number")
        if self.repetition_penalty <= 0:
            raise InputError(f"repetition penalty is {self.repetition_penalty}: use 1 for none or a positive number")
        if self.logprobs < 0:
            raise InputError(f"logprobs is {self.logprobs}: use 0 for none or a positive number")


class SamplingParams(NamedTuple):
    """The settings that may change without compiling again: scalars on the device."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    repetition_penalty: jax.Array

    @classmethod
    def of(cls, sampling: SamplingConfig) -> "SamplingParams":
        """The scalars of these settings."""
        return cls(
            jnp.float32(sampling.temperature),
            jnp.int32(sampling.top_k),
            jnp.float32(sampling.top_p),
            jnp.float32(sampling.repetition_penalty),
        )


def sample_token(logits: jax.Array, generated: jax.Array, key: jax.Array, sampling_params: SamplingParams) -> jax.Array:
    """The next token of each row.

    Args:
      logits: [B, V] float32.
      generated: [B, V] bool, which tokens this row has generated before.
      key: random key for this step.
      sampling_params: see `Sampling`.

    Returns:
      [B] int32.
    """
    penalised = jnp.where(
        logits > 0, logits / sampling_params.repetition_penalty, logits * sampling_params.repetition_penalty
    )
    logits = jnp.where(generated, penalised, logits)
    return jax.lax.cond(
        sampling_params.temperature > 0,
        lambda: _sample(logits, key, sampling_params),
        lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
    )


def _sample(logits: jax.Array, key: jax.Array, sampling_params: SamplingParams) -> jax.Array:
    """Temperature, then top-k, then top-p, on logits sorted from best to worst."""
    vocab = logits.shape[-1]
    order = jnp.argsort(-logits, axis=-1, stable=True)
    best = jnp.take_along_axis(logits, order, axis=-1) / sampling_params.temperature
    best = jnp.where(
        jnp.arange(vocab) < jnp.where(sampling_params.top_k > 0, sampling_params.top_k, vocab), best, -jnp.inf
    )
    before = jnp.cumsum(jax.nn.softmax(best, axis=-1), axis=-1) - jax.nn.softmax(best, axis=-1)
    best = jnp.where((before < sampling_params.top_p) | (jnp.arange(vocab) == 0), best, -jnp.inf)
    rank = jax.random.categorical(key, best, axis=-1)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)
