"""The tasks by name, and any sample of any of them: a pure function of task, split, seed and number."""

import dataclasses
import os
import zlib
from collections.abc import Callable, Iterable

import numpy as np

from data_pipelines.synthetic.image_pool import ImagePool, open_image_pool
from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scene_sampler import SceneSampler
from data_pipelines.synthetic.tasks import counting, grounding, naming, pairs, streaming, text, videos
from vl3_jax.errors import InputError

TEXT, IMAGE, IMAGES, VIDEO, STREAM = "text", "image", "images", "video", "stream"
EXACT, BOX, SPAN, CAPTION, SPEAK = "exact", "box", "span", "caption", "speak"


@dataclasses.dataclass(frozen=True)
class SyntheticTask:
    """A kind of question.

    Attributes:
      name: of the task.
      make: draws one from a studio.
      media: what is shown.
      metric: what answers are judged by, see `scoring`.
      hard: what belongs to which of two or three things must be told.
      judged: part of an evaluation; the others only teach.
    """

    name: str
    make: Callable[[SceneSampler], Example]
    media: str
    metric: str = EXACT
    hard: bool = False
    judged: bool = True


_TASKS = (
    SyntheticTask("addition", text.addition, TEXT),
    SyntheticTask("copy", text.copy, TEXT, judged=False),
    SyntheticTask("recall", text.recall, TEXT, judged=False),
    SyntheticTask("boxes", text.boxes, TEXT, BOX, judged=False),
    SyntheticTask("times", text.times, TEXT, judged=False),
    SyntheticTask("digit", naming.digit, IMAGE),
    SyntheticTask("fashion", naming.fashion, IMAGE),
    SyntheticTask("shape", naming.shape, IMAGE),
    SyntheticTask("colour", naming.colour, IMAGE),
    SyntheticTask("ocr", naming.number, IMAGE),
    SyntheticTask("count", counting.count, IMAGE),
    SyntheticTask("position", counting.position, IMAGE),
    SyntheticTask("box", grounding.box, IMAGE, BOX),
    SyntheticTask("caption", grounding.caption, IMAGE, CAPTION),
    SyntheticTask("talk", grounding.talk, IMAGE, judged=False),
    SyntheticTask("colour_of", naming.colour_of, IMAGE, hard=True),
    SyntheticTask("box_of_two", grounding.box_of_two, IMAGE, BOX, hard=True),
    SyntheticTask("caption_of_two", grounding.caption_of_two, IMAGE, CAPTION, hard=True),
    SyntheticTask("talk_of_two", grounding.talk_of_two, IMAGE, hard=True, judged=False),
    SyntheticTask("pair", pairs.pair, IMAGES),
    SyntheticTask("same", pairs.same, IMAGES, hard=True),
    SyntheticTask("video_name", videos.video_name, VIDEO),
    SyntheticTask("motion", videos.motion, VIDEO),
    SyntheticTask("order", videos.order, VIDEO, hard=True),
    SyntheticTask("when", videos.when, VIDEO, SPAN),
    SyntheticTask("when_of_two", videos.when_of_two, VIDEO, SPAN, hard=True),
    SyntheticTask("talk_of_times", videos.talk_of_times, VIDEO, hard=True, judged=False),
    SyntheticTask("static", videos.static, VIDEO),
    SyntheticTask("stream", streaming.stream, STREAM, SPEAK),
)
TASKS = {task.name: task for task in _TASKS}
JUDGED = tuple(task.name for task in _TASKS if task.judged)


def check_tasks(names: Iterable[str]) -> list[str]:
    """The names themselves. InputError for one that there is not."""
    names = list(names)
    for name in names:
        if name not in TASKS:
            raise InputError(f"task {name!r} is unknown; use some of {', '.join(TASKS)}")
    return names


def example(task: str, split: str, seed: int, number: int, image_pool: ImagePool | None = None) -> Example:
    """One sample; equal arguments give equal samples, whatever else was drawn.

    Args:
      task: of `TASKS`.
      split: "train", "dev" or "test"; no two share a picture or a sum.
      seed: of the data set.
      number: from 0, without end.
      bank: other pictures than the split's own.
    """
    (name,) = check_tasks([task])
    image_pool = image_pool or open_image_pool(split)
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), zlib.crc32(name.encode()), number])
    return TASKS[name].make(SceneSampler(rng, image_pool, split))


def examples(task: str, split: str, seed: int, count: int, images: str | os.PathLike | None = None) -> list[Example]:
    """The first `count` samples; `pictures` is a file of others than the split's own."""
    image_pool = open_image_pool(split, images)
    return [example(task, split, seed, number, image_pool) for number in range(count)]
