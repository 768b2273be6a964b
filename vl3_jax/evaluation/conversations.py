"""Conversations with an engine that many others use at the same time: generators of requests."""

from collections.abc import Generator
from typing import TypeVar

from vl3_jax.inference.answer_text import AnswerText
from vl3_jax.inference.requests import Generation, Request
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.processing.packed_batch import Sample
from vl3_jax.processing.tokenizer import Tokenizer

Result = TypeVar("Result")
# Yields what the engine is asked, one request after the other, and gets the complete answers.
Conversation = Generator[Request, Generation, Result]


def reply(tokenizer: Tokenizer, sample: Sample, sampling: SamplingConfig) -> Conversation[tuple[str, Generation]]:
    """Asks for one answer.

    Args:
      tokenizer: Tokenizer of the model.
      sample: A prompt that ends where the answer begins.
      sampling: Decoding.

    Returns:
      The text without its stop token and the blanks around it, and the tokens.
    """
    text = AnswerText(tokenizer, sampling.stop)
    generation = yield Request(sample, sampling, text.add, streams=False)
    text.end()
    return text.whole.strip(), generation
