"""Prompts of benchmark items: media decoded once for all questions about them, and what identifies a question."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.evaluation.benchmark import Benchmark, Item
from vl3_jax.evaluation.protocol import EvalProtocol
from vl3_jax.processing.media_cache import MediaCache
from vl3_jax.processing.messages import parse_messages
from vl3_jax.processing.processor import Processor, ProcessorOutput


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """An item of a benchmark that is to be asked.

    Attributes:
      benchmark: The benchmark.
      item: The item.
      hash: What the answer depends on: the settings of the run, the text and the media.
    """

    benchmark: Benchmark
    item: Item
    hash: str

    @property
    def id(self) -> str:
        """Identifier among the items of all benchmarks."""
        return f"{self.benchmark.task}/{self.item.id}"


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedQuestion:
    """A question as the model gets it.

    Attributes:
      question: The question.
      processed: The prompt; that of a live stream has its media only. None if there is an error.
      error: Why there is no prompt.
    """

    question: Question
    processed: ProcessorOutput | None
    error: str | None = None


def questions_of(benchmark: Benchmark, items: Iterable[Item], settings: Mapping[str, Any]) -> list[Question]:
    """Returns the questions of a benchmark.

    Args:
      benchmark: The benchmark.
      items: Its items.
      settings: JSON values that every answer depends on: the protocol and the fingerprint of the model.
    """
    base = json.dumps([settings, benchmark.task], sort_keys=True)
    return [Question(benchmark, item, _digest(base, item)) for item in items]


def media_groups(questions: Iterable[Question]) -> list[list[Question]]:
    """Groups the questions of each benchmark that are about the same media; all without media are groups of one."""
    groups: dict[Any, list[Question]] = {}
    for question in questions:
        key = question.item.media_key or question.id
        groups.setdefault((question.benchmark.task, key), []).append(question)
    return list(groups.values())


def swap_media(benchmark: Benchmark, items: Sequence[Item]) -> list[Item]:
    """Gives each item the media of the next one with others, to measure what can be answered without the right ones.

    Raises:
      InputError: All items have the same media, or their prompts or answers depend on them.
    """
    if benchmark.draws or benchmark.shows_regions:
        raise InputError(f"a blind check swaps media, and the masks of {benchmark.task} belong to theirs")
    if any(item.compose for item in items):
        raise InputError(f"a blind check swaps media, and the prompts of {benchmark.task} are made of theirs")
    swapped = []
    for number, item in enumerate(items):
        following = (*items[number + 1 :], *items[:number])
        other = next((other for other in following if other.media_key != item.media_key), None)
        if other is None:
            raise InputError(
                f"a blind check swaps media: ask at least 2 questions of {benchmark.task} that have others"
            )
        swapped.append(dataclasses.replace(item, media=other.media))
    return swapped


class Prompter:
    """Makes prompts by a protocol. It may be used from several threads."""

    def __init__(self, processor: Processor, protocol: EvalProtocol):
        """Creates a prompter.

        Args:
          processor: The processor of the checkpoint.
          protocol: How to ask.
        """
        self.tokenizer = processor.tokenizer
        self._checkpoint, self._protocol = processor.config, protocol

    def processor(self, benchmark: Benchmark) -> Processor:
        """Returns a processor with the settings for a benchmark, which decodes equal media once."""
        config = self._protocol.settings(self._checkpoint, benchmark).processor
        return Processor(self.tokenizer, config, media=MediaCache())

    def prompts(self, questions: Sequence[Question]) -> list[PreparedQuestion]:
        """Returns the prompts of questions about the same media, which are decoded once."""
        processor = self.processor(questions[0].benchmark)
        return [self._prompt(processor, question) for question in questions]

    def _prompt(self, processor: Processor, question: Question) -> PreparedQuestion:
        def frame_times(part: Mapping[str, Any]) -> Sequence[float]:
            (selection,) = processor.read_media(parse_messages([{"role": "user", "content": [part]}])).selections
            return selection.timestamps if selection is not None and selection.timestamps else ()

        item = question.item
        try:
            if question.benchmark.is_stream:
                media = [part for part in item.content(frame_times) if part["type"] != "text"]
                messages = [{"role": "user", "content": media}]
                return PreparedQuestion(question, processor(messages, add_generation_prompt=False))
            system = [{"role": "system", "content": self._protocol.system}] if self._protocol.system else []
            return PreparedQuestion(question, processor([*system, *item.messages(frame_times)]))
        except InputError as error:
            return PreparedQuestion(question, None, str(error))


def _digest(base: str, item: Item) -> str:
    media = [
        {key: _identity(value) if key == part["type"] else value for key, value in part.items()} for part in item.media
    ]
    content = [base, item.text, media, item.compose is not None]
    if item.frames or item.regions:
        content += [[pathlib.Path(frame).parts[-2:] for frame in item.frames], item.mode, item.regions]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=12).hexdigest()


def _identity(medium: Any) -> Any:
    """Returns what identifies a medium on every host: the end of its path and its size, or where it is stored."""
    if dataclasses.is_dataclass(medium) and not isinstance(medium, type):
        stored = dataclasses.asdict(medium)
        return {name: _identity(value) if name == "file" else value for name, value in stored.items()}
    if not isinstance(medium, str):
        return medium
    path = pathlib.Path(medium)
    return [*path.parts[-2:], path.stat().st_size] if path.is_file() else medium
