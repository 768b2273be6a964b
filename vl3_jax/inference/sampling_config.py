"""Settings of decoding."""

import dataclasses

from vl3_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Decoding settings; greedy unless a temperature is set.

    Attributes:
      max_new_tokens: Largest number of tokens to generate.
      temperature: 0 decodes greedily; otherwise logits are divided by it and a token is sampled.
      top_k: Samples from the k most likely tokens; 0 keeps all.
      top_p: Samples from the smallest set of tokens whose probability reaches p.
      repetition_penalty: Divides positive and multiplies negative logits of tokens that were generated before.
      seed: Seed of the random numbers.
      logprobs: Number of top log-probabilities returned per token, of the model's own distribution.
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
            raise InputError(f"top-p is {self.top_p}: use a number above 0 and up to 1")
        if self.top_k < 0:
            raise InputError(f"top-k is {self.top_k}: use 0 for all tokens or a positive number")
        if self.repetition_penalty <= 0:
            raise InputError(f"repetition penalty is {self.repetition_penalty}: use 1 for none or a positive number")
        if self.logprobs < 0:
            raise InputError(f"logprobs is {self.logprobs}: use 0 for none or a positive number")
