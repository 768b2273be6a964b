"""What a model can be asked: questions with their truths, by the name of a task.

find(["nano"])                   every judged task of a family
find(["nano/digit"])             one of them
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.processing.packed_batch import BatchShape

# Families of tasks and the modules that list theirs with `tasks()`; task names begin with the family's.
FAMILIES = {"nano": "vl3_jax.evaluation.nano_tasks"}


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """One question.

    Attributes:
      id: unlike that of any other question of any task.
      text: what is asked, after the media.
      truth: what answers are judged by, for JSON.
      media: gives the parts of a message that are shown; they are read or drawn when it is called.
    """

    id: str
    text: str
    truth: Mapping[str, Any]
    media: Callable[[], list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class QuestionSelection:
    """Which questions of a task are asked.

    Attributes:
      count: how many.
      seed: of the data set.
      split: whose pictures are shown.
      pictures: a file of other pictures than the split's own.
    """

    count: int = 200
    seed: int = 7
    split: str = "test"
    images: str | None = None

    def __post_init__(self):
        if self.count < 1:
            raise InputError(f"{self.count} questions a task: ask at least 1")
        if self.seed < 0:
            raise InputError(f"seed {self.seed}: give 0 or more")


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """A kind of question and how it is judged.

    Attributes:
      name: "family/task".
      metric: what the score is, for tables.
      questions: those of a selection.
      evaluate: answers and truths to "score", "majority" (what a constant answer scores), "count" and more; an answer
        is a text, of a stream a list with what was said after each frame (None for nothing).
      max_new_tokens: where an answer is cut off.
      has_media: whether there is something to see.
      is_stream: whether the model watches and speaks by itself (see `streams`).
      rooms: sizes of batches to compile for, small ones first (see `answering`).
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
    """The tasks of these names, each once, in the order asked for. InputError for a name that there is not."""
    found: dict[str, EvalTask] = {}
    for name in names:
        family = name.partition("/")[0]
        if family not in FAMILIES:
            raise InputError(f"task {name!r} is unknown; known families are {', '.join(FAMILIES)}")
        members = {task.name: task for task in importlib.import_module(FAMILIES[family]).tasks()}
        if name != family and name not in members:
            raise InputError(f"task {name!r} is unknown; use {family} for all, or some of {', '.join(members)}")
        found |= members if name == family else {name: members[name]}
    return list(found.values())


def without_media(questions: Sequence[Question]) -> list[Question]:
    """Each question with the media of the next one: what is still answered rightly was not seen.

    Raises:
      InputError: a single question, which has no other.
    """
    if len(questions) < 2:
        raise InputError("a blind check swaps media: ask at least 2 questions a task")
    others = [*questions[1:], questions[0]]
    return [dataclasses.replace(one, media=other.media) for one, other in zip(questions, others, strict=True)]
