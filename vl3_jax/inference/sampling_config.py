"""Settings of decoding."""

import dataclasses

from vl3_jax.config_tree import AMOUNT, COUNT, LIMITS, SEED, CheckedSettings, Limits
from vl3_jax.errors import SettingError


@dataclasses.dataclass(frozen=True)
class SamplingConfig(CheckedSettings):
    """Decoding settings; greedy unless a temperature is set.

    Attributes:
      max_new_tokens: Largest number of tokens to generate.
      temperature: 0 decodes greedily; otherwise logits are divided by it and a token is sampled.
      top_k: Samples from the k most likely tokens; 0 keeps all.
      top_p: Samples from the smallest set of tokens whose probability reaches p.
      repetition_penalty: Divides positive and multiplies negative logits of tokens that were generated before.
      seed: Seed of the random numbers.
      logprobs: Number of top log-probabilities returned per token, of the model's own distribution.
      stop: Texts that end the answer, which does not contain them.
    """

    max_new_tokens: int = dataclasses.field(default=1024, metadata={LIMITS: COUNT})
    temperature: float = dataclasses.field(default=0.0, metadata={LIMITS: Limits(0, 1000)})
    top_k: int = dataclasses.field(default=0, metadata={LIMITS: AMOUNT})
    top_p: float = dataclasses.field(default=1.0, metadata={LIMITS: Limits(above=0, most=1)})
    repetition_penalty: float = dataclasses.field(default=1.0, metadata={LIMITS: Limits(0.001, 1000)})
    seed: int = dataclasses.field(default=0, metadata={LIMITS: SEED})
    logprobs: int = dataclasses.field(default=0, metadata={LIMITS: AMOUNT})
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "stop", tuple(self.stop))
        if not all(self.stop):
            raise SettingError("stop", self.stop, "give texts, none of them empty")
