"""Greedy answers to many samples side by side, and the likelihood of given next tokens."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vl3_jax.inference.chat_model import ChatModel
from vl3_jax.inference.requests import Request
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.processing.packed_batch import Sample
from vl3_jax.processing.processor import Processor, ProcessorOutput

BATCH_SIZE = 32
_TOP_K = 64  # tokens among which `choice_logprobs` looks for its choices


@dataclasses.dataclass(frozen=True)
class Reply:
    """A generated answer.

    Attributes:
      text: The text without its stop token.
      new_tokens: Number of generated tokens, the stop token included.
      finish_reason: "stop" or "length".
    """

    text: str
    new_tokens: int
    finish_reason: str


class BatchGenerator:
    """Answers samples in order, several at a time.

    Attributes:
      processor: The model's processor, with or without pruning.
      batch_size: Number of samples that are answered side by side.
    """

    def __init__(self, chat_model: ChatModel, batch_size: int = BATCH_SIZE, prune: bool = True):
        """Initialises the generator.

        Args:
          chat_model: The model.
          batch_size: Number of samples that are answered side by side.
          prune: Whether to prune the tokens of videos.
        """
        config = chat_model.processor.config
        config = config if prune else dataclasses.replace(config, prune_threshold=None)
        self.processor = Processor(chat_model.processor.tokenizer, config)
        self.batch_size = batch_size
        self._chat_model = chat_model

    def process(self, media: Sequence[Mapping[str, Any]], text: str | None) -> ProcessorOutput:
        """Processes a user turn of media and a question, up to where the answer begins.

        Args:
          media: Images and videos as parts of a message.
          text: The question. If None, the turn has media only and no answer is prompted for.
        """
        question = [] if text is None else [{"type": "text", "text": text}]
        messages = [{"role": "user", "content": [*media, *question]}]
        return self.processor(messages, add_generation_prompt=text is not None)

    def generate(self, samples: Sequence[Sample], max_new_tokens: int) -> list[Reply]:
        """Generates a continuation of each sample.

        Args:
          samples: Any number of samples, each ending where its answer begins.
          max_new_tokens: Maximum number of tokens of an answer.

        Returns:
          The answers, in the order of the samples.

        Raises:
          InputError: A sample and its answer exceed the model's context.
        """
        penalty = self._chat_model.generation_config.repetition_penalty
        sampling = SamplingConfig(max_new_tokens=max_new_tokens, repetition_penalty=penalty)
        self._chat_model.engine.reserve(rows=self.batch_size)
        answers = [self._chat_model.submit_sample(sample, sampling) for sample in samples]
        replies = []
        for text, generation in answers:
            generation.result()
            text.end()
            replies.append(Reply(text.whole.strip(), len(generation.tokens), generation.finish_reason or ""))
        return replies

    def choice_logprobs(self, samples: Sequence[Sample], choices: Sequence[int]) -> np.ndarray:
        """Returns the log-probabilities of given tokens as the next token.

        Args:
          samples: n samples.
          choices: c token ids.

        Returns:
          [n, c] float32; -inf for a token that is not among the 64 most likely ones.
        """
        engine = self._chat_model.engine
        sampling = SamplingConfig(max_new_tokens=1, logprobs=min(_TOP_K, engine.model.config.text.vocab_size))
        engine.reserve(rows=self.batch_size)
        generations = engine.run([Request(sample, sampling, streams=False) for sample in samples])
        likely = [dict(generation.logprobs[0]) for generation in generations]
        return np.array([[found.get(choice, -np.inf) for choice in choices] for found in likely], np.float32)
