"""Greedy answers in batches of few sizes, so that many questions share few compiled programs."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vl3_jax.inference.chat_model import ChatModel
from vl3_jax.inference.engine import DecodeOutput
from vl3_jax.inference.sampling import SamplingConfig
from vl3_jax.processing.packed_batch import PATCH_DIM, BatchShape, Sample, Visual
from vl3_jax.processing.processor import Processor, ProcessorOutput

BATCH = 32
_RANKED = 64  # tokens among which `decide` looks for its choices


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a model wrote: text up to its end token, how many tokens, and "stop" or "length"."""

    text: str
    new_tokens: int
    finish_reason: str


class BatchGenerator:
    """An assistant that answers samples in order, `batch` at a time.

    Attributes:
      processor: the assistant's, with or without pruning.
      batch: rows of every call; what is missing in the last one is filled up and thrown away.
    """

    def __init__(self, assistant: ChatModel, batch: int = BATCH, prune: bool = True):
        config = assistant.processor.config
        if not prune:
            config = dataclasses.replace(config, prune_threshold=None)
        self.processor = Processor(assistant.processor.tokenizer, config)
        self.batch = batch
        self._engine, self._defaults = assistant.engine, assistant.defaults

    def process(self, media: Sequence[Mapping[str, Any]], text: str | None) -> ProcessorOutput:
        """Media and a question in one user turn, ready to be answered; media alone where `text` is None."""
        words = [] if text is None else [{"type": "text", "text": text}]
        messages = [{"role": "user", "content": [*media, *words]}]
        return self.processor(messages, add_generation_prompt=text is not None)

    def rows(self, bucket_sizes: Sequence[BatchShape]) -> int:
        """How many samples a batch takes: one row is for what gives it the size of a room."""
        return self.batch - 1 if bucket_sizes and self.batch > 1 else self.batch

    def answer(
        self, samples: Sequence[Sample], max_new_tokens: int, bucket_sizes: Sequence[BatchShape] = ()
    ) -> list[Reply]:
        """Continues each sample, which ends where the answer begins.

        Args:
          samples: any number.
          max_new_tokens: where an answer is cut off.
          rooms: sizes to compile for, small ones first; what fits none of them, the engine rounds as ever.

        Raises:
          InputError: a sample and its answer exceed the model's context.
        """
        sampling = SamplingConfig(max_new_tokens=max_new_tokens, repetition_penalty=self._defaults.repetition_penalty)
        replies = []
        for count, steps in self._generated(samples, sampling, bucket_sizes):
            for row in range(count):
                replies.append(self._reply([t for step in steps for t in step.tokens[row][step.valid[row]].tolist()]))
        return replies

    def decide(
        self, samples: Sequence[Sample], choices: Sequence[int], bucket_sizes: Sequence[BatchShape] = ()
    ) -> np.ndarray:
        """Log-probabilities that the next token is each of `choices`.

        Args:
          samples: n of them.
          choices: c token ids.
          rooms: as of `answer`.

        Returns:
          [n, c] float32; -inf for a token that is not among the best 64.
        """
        ranked = min(_RANKED, self._engine.model.config.text.vocab_size)
        found = []
        for count, steps in self._generated(samples, SamplingConfig(max_new_tokens=1, logprobs=ranked), bucket_sizes):
            ids, values = (array[:count, 0] for array in (steps[0].logprob_ids, steps[0].logprobs))
            found.append(np.stack([np.where(ids == one, values, -np.inf).max(axis=1) for one in choices], axis=1))
        return np.concatenate(found)

    def _generated(
        self, samples: Sequence[Sample], sampling: SamplingConfig, bucket_sizes: Sequence[BatchShape]
    ) -> Iterator[tuple[int, list[DecodeOutput]]]:
        """For each batch, how many of its rows are wanted, and the steps until those have ended."""
        size = self.rows(bucket_sizes)
        for start in range(0, len(samples), size):
            chunk = samples[start : start + size]
            room = next((one for one in bucket_sizes if size < self.batch and _holds(one, chunk)), None)
            last = [] if room is None else [_ruler(room)]
            full = [*chunk, *[chunk[-1]] * (self.batch - len(chunk) - len(last)), *last]
            steps, done = [], np.zeros(len(chunk), bool)
            for step in self._engine.generate(full, sampling):
                steps.append(step)
                ends = np.isin(step.tokens, self._defaults.stop_ids) & step.valid
                done |= ends[: len(chunk)].any(axis=1)
                if done.all():
                    break
            yield len(chunk), steps

    def _reply(self, tokens: list[int]) -> Reply:
        stopped = bool(tokens) and tokens[-1] in self._defaults.stop_ids
        text = self.processor.tokenizer.decode(tokens[:-1] if stopped else tokens)
        return Reply(text.strip(), len(tokens), "stop" if stopped else "length")


def _holds(room: BatchShape, samples: Sequence[Sample]) -> bool:
    """Whether all fit; a room for pictures is none for text alone, which needs no tower."""
    patches = max(sum(len(visual.patches) for visual in sample.visuals) for sample in samples)
    return (
        bool(patches) == bool(room.patches)
        and patches <= room.patches
        and max(sample.num_vision_tokens for sample in samples) <= room.vision_tokens
        and max(len(sample.tokens) for sample in samples) <= room.length
    )


def _ruler(room: BatchShape) -> Sample:
    """A meaningless sample that fills a room: with it in a batch, the engine rounds every batch to the same sizes."""
    tokens = np.zeros(room.length, np.int32)
    if not room.patches:
        return Sample(tokens)
    kept = np.arange(room.patches) < room.vision_tokens
    visual = Visual(np.zeros((room.patches, PATCH_DIM), np.uint8), (room.patches, 1, 1), 1, kept)
    return Sample(tokens, np.arange(room.length) < room.vision_tokens, [visual])
