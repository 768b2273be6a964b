"""The tasks by name, and any sample of any of them: a pure function of task, split, seed and number."""

import dataclasses
import os
import zlib
from collections.abc import Callable, Iterable

import numpy as np

from data_pipelines.synthetic.bank import Bank, open_bank
from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.studio import Studio
from data_pipelines.synthetic.tasks import clips, counting, grounding, naming, pairs, streaming, text
from vl3_jax.errors import InputError

TEXT, IMAGE, IMAGES, VIDEO, STREAM = "text", "image", "images", "video", "stream"
EXACT, BOX, SPAN, CAPTION, SPEAK = "exact", "box", "span", "caption", "speak"


@dataclasses.dataclass(frozen=True)
class Task:
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
    make: Callable[[Studio], Example]
    media: str
    metric: str = EXACT
    hard: bool = False
    judged: bool = True


_TASKS = (
    Task("addition", text.addition, TEXT),
    Task("copy", text.copy, TEXT, judged=False),
    Task("recall", text.recall, TEXT, judged=False),
    Task("boxes", text.boxes, TEXT, BOX, judged=False),
    Task("times", text.times, TEXT, judged=False),
    Task("digit", naming.digit, IMAGE),
    Task("fashion", naming.fashion, IMAGE),
    Task("shape", naming.shape, IMAGE),
    Task("colour", naming.colour, IMAGE),
    Task("ocr", naming.number, IMAGE),
    Task("count", counting.count, IMAGE),
    Task("position", counting.position, IMAGE),
    Task("box", grounding.box, IMAGE, BOX),
    Task("caption", grounding.caption, IMAGE, CAPTION),
    Task("talk", grounding.talk, IMAGE, judged=False),
    Task("colour_of", naming.colour_of, IMAGE, hard=True),
    Task("box_of_two", grounding.box_of_two, IMAGE, BOX, hard=True),
    Task("caption_of_two", grounding.caption_of_two, IMAGE, CAPTION, hard=True),
    Task("talk_of_two", grounding.talk_of_two, IMAGE, hard=True, judged=False),
    Task("pair", pairs.pair, IMAGES),
    Task("same", pairs.same, IMAGES, hard=True),
    Task("video_name", clips.video_name, VIDEO),
    Task("motion", clips.motion, VIDEO),
    Task("order", clips.order, VIDEO, hard=True),
    Task("when", clips.when, VIDEO, SPAN),
    Task("when_of_two", clips.when_of_two, VIDEO, SPAN, hard=True),
    Task("talk_of_times", clips.talk_of_times, VIDEO, hard=True, judged=False),
    Task("static", clips.static, VIDEO),
    Task("stream", streaming.stream, STREAM, SPEAK),
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


def example(task: str, split: str, seed: int, number: int, bank: Bank | None = None) -> Example:
    """One sample; equal arguments give equal samples, whatever else was drawn.

    Args:
      task: of `TASKS`.
      split: "train", "dev" or "test"; no two share a picture or a sum.
      seed: of the data set.
      number: from 0, without end.
      bank: other pictures than the split's own.
    """
    (name,) = check_tasks([task])
    bank = bank or open_bank(split)
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), zlib.crc32(name.encode()), number])
    return TASKS[name].make(Studio(rng, bank, split))


def examples(task: str, split: str, seed: int, count: int, pictures: str | os.PathLike | None = None) -> list[Example]:
    """The first `count` samples; `pictures` is a file of others than the split's own."""
    bank = open_bank(split, pictures)
    return [example(task, split, seed, number, bank) for number in range(count)]
