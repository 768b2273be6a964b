"""Evaluation tasks by name: questions with references, and how answers are scored.

find(["nano"])                   all tasks
find(["nano/digit"])             one of them

The tasks are the synthetic ones that the bundled model `nano` is trained for, over source images of the held-out split.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from data_pipelines.synthetic import scoring
from data_pipelines.synthetic.image_pool import SPLITS
from data_pipelines.synthetic.registry import EVALUATED_TASKS, STREAM, TASKS, TEXT, SyntheticTask, examples
from data_pipelines.synthetic.scenes import Scene, SyntheticVideo
from vl3_jax.config_tree import CHOICES, COUNT, LIMITS, SEED, CheckedSettings
from vl3_jax.errors import InputError

FAMILY = "nano"
_MAX_NEW_TOKENS = 48  # the longest reference answers, boxes, have half as many
_STREAM_MAX_NEW_TOKENS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """A question.

    Attributes:
      id: Identifier, unique among the questions of all tasks.
      text: The question, asked after the media.
      reference: JSON values that the answer is scored against.
      media: Renders the media and returns them as parts of a message.
    """

    id: str
    text: str
    reference: Mapping[str, Any]
    media: Callable[[], list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class QuestionSelection(CheckedSettings):
    """Which questions of a task to ask.

    Attributes:
      count: Number of questions.
      seed: Random seed of the questions.
      split: Split of the source images.
      images: A file of source images to use instead of the split's own.
    """

    count: int = dataclasses.field(default=200, metadata={LIMITS: COUNT})
    seed: int = dataclasses.field(default=7, metadata={LIMITS: SEED})
    split: str = dataclasses.field(default="test", metadata={CHOICES: SPLITS})
    images: str | None = None


class EvalTask:
    """A kind of question and its scoring.

    Attributes:
      name: "nano/task".
      metric: Name of the metric, for tables.
      has_media: Whether the questions have images or videos.
      is_stream: Whether the task is a live stream, in which the model decides when to speak (see `live_streams`).
      max_new_tokens: Maximum number of tokens of an answer.
    """

    def __init__(self, task: SyntheticTask):
        self._task = task.name
        self.name, self.metric = f"{FAMILY}/{task.name}", task.metric
        self.has_media, self.is_stream = task.media != TEXT, task.media == STREAM
        self.max_new_tokens = _STREAM_MAX_NEW_TOKENS if self.is_stream else _MAX_NEW_TOKENS

    def questions(self, selection: QuestionSelection) -> list[Question]:
        """Returns the questions of a selection; their media are rendered when `Question.media` is called."""
        samples = examples(self._task, selection.split, selection.seed, selection.count, selection.images)
        return [
            Question(
                f"{self.name}/{number}",
                sample.question,
                # The description of the media is not needed for scoring, and the seed and the number reproduce it.
                {name: value for name, value in sample.reference.items() if name != "media"},
                lambda media=sample.media: [media_part(medium) for medium in media],
            )
            for number, sample in enumerate(samples)
        ]

    def evaluate(self, answers: Sequence[Any], references: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Scores answers.

        Args:
          answers: Texts; for a stream, lists of what was said after each frame (None for nothing).
          references: References of the questions, in the order of the answers.

        Returns:
          "score", "majority" (the score of the best constant answer), "count" and further values of the metric.
        """
        return scoring.evaluate(self._task, answers, references)


def media_part(medium: Scene | SyntheticVideo) -> dict[str, Any]:
    """Renders an image or video and returns it as a part of a message."""
    if isinstance(medium, SyntheticVideo):
        return {"type": "video", "video": medium.pixels(), "timestamps": medium.times}
    return {"type": "image", "image": medium.pixels()}


def find(names: Iterable[str]) -> list[EvalTask]:
    """Returns the tasks of these names, without duplicates, in the order of the names.

    Args:
      names: Names of tasks, or "nano" for all of them, in the order of the registry.

    Raises:
      InputError: A name is unknown.
    """
    known = {task.name: task for task in (EvalTask(TASKS[name]) for name in EVALUATED_TASKS)}
    found: dict[str, EvalTask] = {}
    for name in names:
        if name not in (FAMILY, *known):
            raise InputError(f"task {name!r} is unknown; use {FAMILY} for all, or some of {', '.join(known)}")
        found |= known if name == FAMILY else {name: known[name]}
    return list(found.values())


def swap_media(questions: Sequence[Question]) -> list[Question]:
    """Gives each question the media of the next one, to measure what can be answered without seeing the right media.

    Raises:
      InputError: There is only one question.
    """
    if len(questions) < 2:
        raise InputError("a blind check swaps media: ask at least 2 questions per task")
    others = [*questions[1:], questions[0]]
    return [dataclasses.replace(question, media=other.media) for question, other in zip(questions, others, strict=True)]
