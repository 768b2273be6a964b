"""Evaluation tasks by name: questions with references, and how answers are scored.

find(["nano"])                   all tasks of a family
find(["nano/digit"])             one of them
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from data_pipelines.synthetic.image_pool import SPLITS
from vl3_jax.config_tree import CHOICES
from vl3_jax.errors import InputError
from vl3_jax.processing.packed_batch import BatchShape

# Each family's module, whose `tasks()` returns the family's tasks. Task names begin with the name of the family.
FAMILIES = {"nano": "vl3_jax.evaluation.nano_tasks"}


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """A question.

    Attributes:
      id: Identifier, unique among the questions of all tasks.
      text: The question, asked after the media.
      reference: JSON values that the answer is scored against.
      media: Reads or renders the media and returns them as parts of a message.
    """

    id: str
    text: str
    reference: Mapping[str, Any]
    media: Callable[[], list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class QuestionSelection:
    """Which questions of a task to ask.

    Attributes:
      count: Number of questions.
      seed: Random seed of the questions.
      split: Split of the source images.
      images: A file of source images to use instead of the split's own.
    """

    count: int = 200
    seed: int = 7
    split: str = dataclasses.field(default="test", metadata={CHOICES: SPLITS})
    images: str | None = None

    def __post_init__(self):
        if self.count < 1:
            raise InputError(f"{self.count} questions per task: ask at least 1")
        if self.seed < 0:
            raise InputError(f"seed {self.seed}: give 0 or more")


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """A kind of question and its scoring.

    Attributes:
      name: "family/task".
      metric: Name of the metric, for tables.
      questions: Returns the questions of a selection.
      evaluate: Maps answers and references to "score", "majority" (the score of the best constant answer), "count" and
        further values. An answer is a text; for a stream, the list of what was said after each frame (None for
        nothing).
      max_new_tokens: Maximum number of tokens of an answer.
      has_media: Whether the questions have images or videos.
      is_stream: Whether the task is a live stream, in which the model decides when to speak (see `live_streams`).
      bucket_sizes: Row sizes to compile for, in ascending order (see `batch_generator`).
    """

    name: str
    metric: str
    questions: Callable[[QuestionSelection], list[Question]]
    evaluate: Callable[[Sequence[Any], Sequence[Mapping[str, Any]]], dict[str, float]]
    max_new_tokens: int
    has_media: bool = True
    is_stream: bool = False
    bucket_sizes: tuple[BatchShape, ...] = ()


def find(names: Iterable[str]) -> list[EvalTask]:
    """Returns the tasks of these names, without duplicates, in the order of the names.

    Args:
      names: Names of tasks, or of families for all of their tasks.

    Raises:
      InputError: A name is unknown.
    """
    tasks: dict[str, EvalTask] = {}
    for name in names:
        family = name.partition("/")[0]
        if family not in FAMILIES:
            raise InputError(f"task {name!r} is unknown; known families are {', '.join(FAMILIES)}")
        members = {task.name: task for task in importlib.import_module(FAMILIES[family]).tasks()}
        if name != family and name not in members:
            raise InputError(f"task {name!r} is unknown; use {family} for all, or some of {', '.join(members)}")
        tasks |= members if name == family else {name: members[name]}
    return list(tasks.values())


def swap_media(questions: Sequence[Question]) -> list[Question]:
    """Gives each question the media of the next one, to measure what can be answered without seeing the right media.

    Raises:
      InputError: There is only one question.
    """
    if len(questions) < 2:
        raise InputError("a blind check swaps media: ask at least 2 questions per task")
    others = [*questions[1:], questions[0]]
    return [dataclasses.replace(question, media=other.media) for question, other in zip(questions, others, strict=True)]
