"""The synthetic questions that the default model `nano` is trained for, over pictures of the held-out split."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.synthetic.image_pool import open_image_pool
from data_pipelines.synthetic.registry import JUDGED, TASKS, example
from data_pipelines.synthetic.registry import STREAM as LIVE
from data_pipelines.synthetic.registry import TEXT as NOTHING
from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scenes import Scene, SyntheticVideo
from data_pipelines.synthetic.scoring import evaluate
from vl3_jax.evaluation.tasks import EvalTask, Question, QuestionSelection
from vl3_jax.processing.packed_batch import BatchShape

FAMILY = "nano"
_LONGEST = 48  # tokens of an answer; the longest true ones, boxes, have half as many
# What questions of these tasks need, in few sizes: compiling one more takes longer than a fuller fit of it saves.
_ROOMS = tuple(
    BatchShape(length, patches, vision_tokens)
    for length, patches, vision_tokens in [(64, 0, 0), (64, 64, 64), (128, 96, 96), (192, 384, 96), (256, 384, 96)]
)
_STREAM_ROOMS = _ROOMS[2:]
_LONGEST_WORD = 8  # tokens of what is said in a stream


def tasks() -> list[EvalTask]:
    """All that are judged, in the order in which they are taught."""
    return [_task(name) for name in JUDGED]


def media_part(medium: Scene | SyntheticVideo) -> dict[str, Any]:
    """A picture or clip, drawn, as part of a message."""
    if isinstance(medium, SyntheticVideo):
        return {"type": "video", "video": medium.pixels(), "timestamps": medium.times}
    return {"type": "image", "image": medium.pixels()}


def question(task: str, drawn: Example, number: int) -> Question:
    """A sample of the generator as a question; the drawing itself is left for later."""
    # What lies where is drawn again from the seed; the record of an answer need not repeat it.
    truth = {name: value for name, value in drawn.truth.items() if name != "media"}
    return Question(
        f"{FAMILY}/{task}/{number}", drawn.question, truth, lambda: [media_part(medium) for medium in drawn.media]
    )


def _task(name: str) -> EvalTask:
    kind = TASKS[name]
    is_stream = kind.media == LIVE
    return EvalTask(
        name=f"{FAMILY}/{name}",
        metric=kind.metric,
        questions=functools.partial(_questions, name),
        evaluate=functools.partial(_evaluate, name),
        max_new_tokens=_LONGEST_WORD if is_stream else _LONGEST,
        has_media=kind.media != NOTHING,
        is_stream=is_stream,
        bucket_sizes=_STREAM_ROOMS if is_stream else _ROOMS,
    )


def _questions(name: str, selection: QuestionSelection) -> list[Question]:
    image_pool = open_image_pool(selection.split, selection.images)
    numbers = range(selection.count)
    return [question(name, example(name, selection.split, selection.seed, n, image_pool), n) for n in numbers]


def _evaluate(name: str, answers: Sequence[Any], truths: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return evaluate(name, answers, truths)
