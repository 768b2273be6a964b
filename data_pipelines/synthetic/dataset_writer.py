"""Data sets on disk, one folder for each task: `annotations.jsonl` and lossless media beside it."""

import json
import os
import pathlib
from collections.abc import Callable, Mapping

from data_pipelines.mixtures import ANNOTATIONS
from data_pipelines.synthetic.encoding import encode_image, encode_video
from data_pipelines.synthetic.image_pool import open_image_pool
from data_pipelines.synthetic.registry import check_tasks, example
from data_pipelines.synthetic.scenes import SyntheticVideo
from vl3_jax.errors import InputError

MEDIA = "media"


def write(
    folder: str | os.PathLike,
    split: str,
    counts: Mapping[str, int],
    seed: int = 0,
    images: str | os.PathLike | None = None,
    on_progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> dict[str, pathlib.Path]:
    """Writes `<folder>/<task>/annotations.jsonl` and `<folder>/<task>/media/`; what was there of a task is replaced.

    Each line has, besides what a reader needs, the name of its "task" and the "truth" that answers are judged by.

    Args:
      folder: made if it is not there.
      split: "train", "dev" or "test".
      counts: samples of each task.
      seed: of the data set.
      pictures: an npz file of others than the split's own.
      on_progress: told task, samples done, of how many.

    Returns:
      The annotation file of each task.

    Raises:
      InputError: unknown task, split or pictures; the folder cannot be written.
    """
    check_tasks(counts)
    image_pool = open_image_pool(split, images)
    written = {}
    for task, count in counts.items():
        if count < 1:
            raise InputError(f"{task}: {count} samples; give at least 1")
        home = pathlib.Path(folder) / task
        try:
            (home / MEDIA).mkdir(parents=True, exist_ok=True)
            (home / ANNOTATIONS).unlink(missing_ok=True)  # it would name media that are being replaced
            lines = []
            for number in range(count):
                drawn = example(task, split, seed, number, image_pool)
                names = [_write_medium(home, number, rank, one) for rank, one in enumerate(drawn.media)]
                lines.append(json.dumps(drawn.record(names, task)) + "\n")
                on_progress(task, number + 1, count)
            partial = home / f"{ANNOTATIONS}.{os.getpid()}.partial"
            partial.write_text("".join(lines), encoding="utf-8")
            os.replace(partial, home / ANNOTATIONS)
        except OSError as error:
            raise InputError(f"{home}: {error.strerror or error}; choose a folder that can be written") from None
        written[task] = home / ANNOTATIONS
    return written


def _write_medium(home: pathlib.Path, number: int, rank: int, medium) -> str:
    """Its name relative to the task's folder."""
    is_clip = isinstance(medium, SyntheticVideo)
    name = f"{MEDIA}/{number:06d}{'ab'[rank] if rank else ''}.{'mov' if is_clip else 'png'}"
    content = (encode_video if is_clip else encode_image)(medium.pixels())
    (home / name).write_bytes(content)
    return name
