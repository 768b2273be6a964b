"""Writes synthetic data sets to disk: a folder per task, with `annotations.jsonl` and lossless media files."""

import json
import os
import pathlib
from collections.abc import Callable, Mapping

from data_pipelines.mixtures import ANNOTATIONS
from data_pipelines.synthetic.encoding import encode_image, encode_video
from data_pipelines.synthetic.image_pool import open_image_pool
from data_pipelines.synthetic.registry import check_tasks, example
from data_pipelines.synthetic.scenes import Scene, SyntheticVideo
from vl3_jax.errors import InputError
from vl3_jax.storage.durable import rename

MEDIA = "media"


def write(
    folder: str | os.PathLike,
    split: str,
    counts: Mapping[str, int],
    seed: int = 0,
    images: str | os.PathLike | None = None,
    on_progress: Callable[[], object] = lambda: None,
) -> dict[str, pathlib.Path]:
    """Writes `<folder>/<task>/annotations.jsonl` and `<folder>/<task>/media/`, replacing earlier files of the task.

    Besides what a reader needs, each line has the name of its "task" and the "reference" for scoring answers.

    Args:
      folder: Output folder; created if it does not exist.
      split: "train", "dev" or "test".
      counts: Number of samples of each task.
      seed: Random seed of the data set.
      images: An npz file of source images to use instead of the split's own.
      on_progress: Called after each sample.

    Returns:
      The annotation file of each task.

    Raises:
      InputError: A task or the split is unknown, the source images cannot be read, or the folder cannot be written.
    """
    check_tasks(counts)
    image_pool = open_image_pool(split, images)
    written = {}
    for task, count in counts.items():
        if count < 1:
            raise InputError(f"{task}: {count} samples; give at least 1")
        task_folder = pathlib.Path(folder) / task
        try:
            (task_folder / MEDIA).mkdir(parents=True, exist_ok=True)
            (task_folder / ANNOTATIONS).unlink(missing_ok=True)  # it would name media that are being replaced
            lines = []
            for number in range(count):
                sample = example(task, split, seed, number, image_pool)
                names = [
                    _write_media_file(task_folder, number, rank, medium) for rank, medium in enumerate(sample.media)
                ]
                lines.append(json.dumps(sample.record(names, task)) + "\n")
                on_progress()
            partial = task_folder / f"{ANNOTATIONS}.{os.getpid()}.partial"
            partial.write_text("".join(lines), encoding="utf-8")
            rename(partial, task_folder / ANNOTATIONS)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"{task_folder}: {reason}; choose a folder that can be written") from None
        written[task] = task_folder / ANNOTATIONS
    return written


def _write_media_file(task_folder: pathlib.Path, number: int, rank: int, medium: Scene | SyntheticVideo) -> str:
    """Returns the file's name relative to the task's folder."""
    is_video = isinstance(medium, SyntheticVideo)
    name = f"{MEDIA}/{number:06d}{'ab'[rank] if rank else ''}.{'mov' if is_video else 'png'}"
    content = (encode_video if is_video else encode_image)(medium.pixels())
    (task_folder / name).write_bytes(content)
    return name
