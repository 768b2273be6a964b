"""Greedy generation in batches of a few fixed shapes, so that many questions share few compiled programs."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vl3_jax.inference.chat_model import ChatModel
from vl3_jax.inference.engine import DecodeOutput
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.processing.packed_batch import BatchShape, Sample
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
    """Answers samples in order, a fixed number at a time.

    Attributes:
      processor: The model's processor, with or without pruning.
      batch_size: Number of rows of every batch. Missing rows of the last batch are padded and their output dropped.
    """

    def __init__(self, chat_model: ChatModel, batch_size: int = BATCH_SIZE, prune: bool = True):
        """Initialises the generator.

        Args:
          chat_model: The model.
          batch_size: Number of rows of every batch.
          prune: Whether to prune the tokens of videos.
        """
        config = chat_model.processor.config
        config = config if prune else dataclasses.replace(config, prune_threshold=None)
        self.processor = Processor(chat_model.processor.tokenizer, config)
        self.batch_size = batch_size
        self._engine, self._generation_config = chat_model.engine, chat_model.generation_config

    def process(self, media: Sequence[Mapping[str, Any]], text: str | None) -> ProcessorOutput:
        """Processes a user turn of media and a question, up to where the answer begins.

        Args:
          media: Images and videos as parts of a message.
          text: The question. If None, the turn has media only and no answer is prompted for.
        """
        question = [] if text is None else [{"type": "text", "text": text}]
        messages = [{"role": "user", "content": [*media, *question]}]
        return self.processor(messages, add_generation_prompt=text is not None)

    def generate(
        self, samples: Sequence[Sample], max_new_tokens: int, bucket_sizes: Sequence[BatchShape] = ()
    ) -> list[Reply]:
        """Generates a continuation of each sample.

        Args:
          samples: Any number of samples, each ending where its answer begins.
          max_new_tokens: Maximum number of tokens of an answer.
          bucket_sizes: Row sizes to compile for, in ascending order. A batch is padded to the first that fits; the
            engine chooses the size of a batch that none fits.

        Returns:
          The answers, in the order of the samples.

        Raises:
          InputError: A sample and its answer exceed the model's context.
        """
        penalty = self._generation_config.repetition_penalty
        sampling = SamplingConfig(max_new_tokens=max_new_tokens, repetition_penalty=penalty)
        return [
            self._reply([token for step in steps for token in step.tokens[row][step.valid[row]].tolist()])
            for count, steps in self._batches(samples, sampling, bucket_sizes)
            for row in range(count)
        ]

    def choice_logprobs(
        self, samples: Sequence[Sample], choices: Sequence[int], bucket_sizes: Sequence[BatchShape] = ()
    ) -> np.ndarray:
        """Returns the log-probabilities of given tokens as the next token.

        Args:
          samples: n samples.
          choices: c token ids.
          bucket_sizes: As for `generate`.

        Returns:
          [n, c] float32; -inf for a token that is not among the 64 most likely ones.
        """
        top_k = min(_TOP_K, self._engine.model.config.text.vocab_size)
        logprobs = []
        for count, steps in self._batches(samples, SamplingConfig(max_new_tokens=1, logprobs=top_k), bucket_sizes):
            ids, values = steps[0].logprob_ids[:count], steps[0].logprobs[:count]  # [n, 1, K]
            is_choice = ids == np.asarray(choices)[:, None]  # [n, c, K]
            logprobs.append(np.where(is_choice, values, -np.inf).max(axis=-1))
        return np.concatenate(logprobs)

    def _batches(
        self, samples: Sequence[Sample], sampling: SamplingConfig, bucket_sizes: Sequence[BatchShape]
    ) -> Iterator[tuple[int, list[DecodeOutput]]]:
        """Yields the number of samples and the decoder outputs of each batch, whose other rows are padding."""
        for start in range(0, len(samples), self.batch_size):
            chunk = samples[start : start + self.batch_size]
            bucket = next((bucket for bucket in bucket_sizes if _fits(chunk, bucket)), None)
            padding = [chunk[-1]] * (self.batch_size - len(chunk))
            yield len(chunk), list(self._engine.generate([*chunk, *padding], sampling, shape=bucket))

    def _reply(self, tokens: list[int]) -> Reply:
        stopped = bool(tokens) and tokens[-1] in self._generation_config.stop_ids
        text = self.processor.tokenizer.decode(tokens[:-1] if stopped else tokens)
        return Reply(text.strip(), len(tokens), "stop" if stopped else "length")


def _fits(samples: Sequence[Sample], bucket: BatchShape) -> bool:
    """Returns whether all samples fit. Text alone never fits a bucket with patches, as it does not need the tower."""
    patches = max(sum(len(visual.patches) for visual in sample.visuals) for sample in samples)
    return (
        bool(patches) == bool(bucket.patches)
        and patches <= bucket.patches
        and max(sample.num_vision_tokens for sample in samples) <= bucket.vision_tokens
        and max(len(sample.tokens) for sample in samples) <= bucket.length
    )
