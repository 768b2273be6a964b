"""The synthetic tasks that the bundled model `nano` is trained for, over source images of the held-out split."""

import functools
from typing import Any

from data_pipelines.synthetic.image_pool import open_image_pool
from data_pipelines.synthetic.registry import EVALUATED_TASKS, STREAM, TASKS, TEXT, example
from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scenes import Scene, SyntheticVideo
from data_pipelines.synthetic.scoring import evaluate
from vl3_jax.evaluation.tasks import EvalTask, Question, QuestionSelection
from vl3_jax.processing.packed_batch import BatchShape

FAMILY = "nano"
_MAX_NEW_TOKENS = 48  # the longest reference answers, boxes, have half as many
_STREAM_MAX_NEW_TOKENS = 8
# Few row sizes for all questions of these tasks: compiling one more takes longer than its tighter fit saves.
_BUCKET_SIZES = tuple(
    BatchShape(length, patches, vision_tokens)
    for length, patches, vision_tokens in [(64, 0, 0), (64, 64, 64), (128, 96, 96), (192, 384, 96), (256, 384, 96)]
)
_STREAM_BUCKET_SIZES = _BUCKET_SIZES[2:]


def tasks() -> list[EvalTask]:
    """Returns all evaluated tasks, in the order of the registry."""
    return [_task(name) for name in EVALUATED_TASKS]


def media_part(medium: Scene | SyntheticVideo) -> dict[str, Any]:
    """Renders an image or video and returns it as a part of a message."""
    if isinstance(medium, SyntheticVideo):
        return {"type": "video", "video": medium.pixels(), "timestamps": medium.times}
    return {"type": "image", "image": medium.pixels()}


def question(task: str, sample: Example, number: int) -> Question:
    """Returns a generated sample as a question; its media are rendered when `Question.media` is called."""
    # The description of the media is not needed for scoring, and the seed and the number reproduce it.
    reference = {name: value for name, value in sample.reference.items() if name != "media"}
    return Question(
        f"{FAMILY}/{task}/{number}", sample.question, reference, lambda: [media_part(medium) for medium in sample.media]
    )


def _task(name: str) -> EvalTask:
    task = TASKS[name]
    is_stream = task.media == STREAM
    return EvalTask(
        name=f"{FAMILY}/{name}",
        metric=task.metric,
        questions=functools.partial(_questions, name),
        evaluate=functools.partial(evaluate, name),
        max_new_tokens=_STREAM_MAX_NEW_TOKENS if is_stream else _MAX_NEW_TOKENS,
        has_media=task.media != TEXT,
        is_stream=is_stream,
        bucket_sizes=_STREAM_BUCKET_SIZES if is_stream else _BUCKET_SIZES,
    )


def _questions(name: str, selection: QuestionSelection) -> list[Question]:
    image_pool = open_image_pool(selection.split, selection.images)
    numbers = range(selection.count)
    return [question(name, example(name, selection.split, selection.seed, n, image_pool), n) for n in numbers]
