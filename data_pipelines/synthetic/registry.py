"""The tasks by name, and their samples: each is a pure function of task, split, seed and number."""

import dataclasses
import functools
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
      name: Name of the task.
      generate: Generates a sample with the random choices of a sampler.
      media: Kind of the media: `TEXT` (none), `IMAGE`, `IMAGES`, `VIDEO` or `STREAM`.
      metric: Metric of the answers, see `scoring`.
      evaluated: Whether the task is part of evaluations; other tasks are for training only.
    """

    name: str
    generate: Callable[[SceneSampler], Example]
    media: str
    metric: str = EXACT
    evaluated: bool = True


_TASKS = (
    SyntheticTask("addition", text.addition, TEXT),
    SyntheticTask("copy", text.copy, TEXT, evaluated=False),
    SyntheticTask("recall", text.recall, TEXT, evaluated=False),
    SyntheticTask("boxes", text.boxes, TEXT, BOX, evaluated=False),
    SyntheticTask("times", text.times, TEXT, evaluated=False),
    SyntheticTask("digit", functools.partial(naming.name_of, "digit"), IMAGE),
    SyntheticTask("fashion", functools.partial(naming.name_of, "fashion"), IMAGE),
    SyntheticTask("shape", functools.partial(naming.name_of, "shape"), IMAGE),
    SyntheticTask("colour", naming.colour, IMAGE),
    SyntheticTask("ocr", naming.number, IMAGE),
    SyntheticTask("count", counting.count, IMAGE),
    SyntheticTask("position", counting.position, IMAGE),
    SyntheticTask("box", grounding.box, IMAGE, BOX),
    SyntheticTask("caption", grounding.caption, IMAGE, CAPTION),
    SyntheticTask("talk", grounding.talk, IMAGE, evaluated=False),
    SyntheticTask("colour_of", naming.colour_of, IMAGE),
    SyntheticTask("box_of_two", grounding.box_of_two, IMAGE, BOX),
    SyntheticTask("caption_of_two", grounding.caption_of_two, IMAGE, CAPTION),
    SyntheticTask("talk_of_two", grounding.talk_of_two, IMAGE, evaluated=False),
    SyntheticTask("pair", pairs.pair, IMAGES),
    SyntheticTask("same", pairs.same, IMAGES),
    SyntheticTask("video_name", videos.video_name, VIDEO),
    SyntheticTask("motion", videos.motion, VIDEO),
    SyntheticTask("order", videos.order, VIDEO),
    SyntheticTask("when", videos.when, VIDEO, SPAN),
    SyntheticTask("when_of_two", videos.when_of_two, VIDEO, SPAN),
    SyntheticTask("talk_of_times", videos.talk_of_times, VIDEO, evaluated=False),
    SyntheticTask("static", videos.static, VIDEO),
    SyntheticTask("stream", streaming.stream, STREAM, SPEAK),
)
TASKS = {task.name: task for task in _TASKS}
EVALUATED_TASKS = tuple(task.name for task in _TASKS if task.evaluated)


def check_tasks(names: Iterable[str]) -> list[str]:
    """Returns the names as a list.

    Raises:
      InputError: A name is not in `TASKS`.
    """
    names = list(names)
    for name in names:
        if name not in TASKS:
            raise InputError(f"task {name!r} is unknown; use some of {', '.join(TASKS)}")
    return names


def example(task: str, split: str, seed: int, number: int, image_pool: ImagePool | None = None) -> Example:
    """Generates one sample. Equal arguments give equal samples, independently of all other samples.

    Args:
      task: One of `TASKS`.
      split: "train", "dev" or "test". Splits have no source image and no sum in common.
      seed: Random seed of the data set.
      number: Number of the sample in the data set, from 0 without an upper limit.
      image_pool: Source images to use instead of the split's own.

    Raises:
      InputError: The task or the split is unknown.
    """
    (name,) = check_tasks([task])
    image_pool = image_pool or open_image_pool(split)
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), zlib.crc32(name.encode()), number])
    return TASKS[name].generate(SceneSampler(rng, image_pool, split))


def examples(task: str, split: str, seed: int, count: int, images: str | os.PathLike | None = None) -> list[Example]:
    """Generates the first `count` samples; `images` is an npz file to use instead of the split's own source images."""
    image_pool = open_image_pool(split, images)
    return [example(task, split, seed, number, image_pool) for number in range(count)]
