"""Endless training data without files: a source whose samples are drawn when they are asked for.

    synthetic://train/digit?count=20000&seed=3              one task
    synthetic://train/box,box_of_two=2?count=5000           several, the second twice as often
    synthetic://train/stage2?count=100000                   the mix of a stage
    synthetic://test/digit?count=200&pictures=mine.npz      over other pictures

Sample i is a pure function of split, tasks, seed and i; the count only says how many there are to be.
"""

import dataclasses
import functools
import hashlib
import pathlib
import urllib.parse
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.sources.base import Record, RecordSource
from data_pipelines.synthetic.encoding import encode_video
from data_pipelines.synthetic.image_pool import ImagePool, open_image_pool
from data_pipelines.synthetic.registry import check_tasks, example
from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scenes import Scene, SyntheticVideo
from data_pipelines.synthetic.stages import STAGES
from vl3_jax.errors import InputError

SCHEME = "synthetic"
# Modules whose text does not change what is drawn.
_NOT_DRAWING = ("__init__", "__main__", "mixture", "parsing", "scoring", "source", "stages", "tokenizer", "writing")
_STRIDE, _PERIOD = 2_654_435_769, 2**32  # of the golden ratio: every stretch of samples has all tasks in proportion


@dataclasses.dataclass(frozen=True)
class Request:
    """What a source is to hold.

    Attributes:
      split: "train", "dev" or "test".
      tasks: weight of each.
      count: samples.
      seed: of the data set.
      pictures: an npz file of others than the split's own.
    """

    split: str
    tasks: Mapping[str, float]
    count: int = 1_000_000
    seed: int = 0
    images: str | None = None

    def __post_init__(self):
        check_tasks(self.tasks)
        if not self.tasks or min(self.tasks.values()) <= 0:
            raise InputError(f"synthetic tasks {dict(self.tasks)}: give at least one, with weights above 0")
        if self.count < 1 or self.seed < 0:
            raise InputError(f"synthetic data of {self.count} samples and seed {self.seed}; give 1 or more, 0 or more")

    @property
    def path(self) -> str:
        """As a URL."""
        tasks = ",".join(name if weight == 1 else f"{name}={weight:g}" for name, weight in self.tasks.items())
        query = f"count={self.count}&seed={self.seed}"
        if self.images:
            query += f"&pictures={urllib.parse.quote(self.images, safe='/')}"
        return f"{SCHEME}://{self.split}/{tasks}?{query}"


def parse(path: str) -> Request:
    """The request of a URL. InputError says what is wrong with it."""
    parts = urllib.parse.urlsplit(path)
    if parts.scheme != SCHEME or not parts.netloc or not parts.path.strip("/"):
        raise InputError(f"{path}: give synthetic data as {SCHEME}://train/TASK,...?count=1000&seed=0")
    query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(set(query) - {"count", "seed", "pictures"})
    if unknown:
        raise InputError(f"{path}: unknown setting {unknown[0]!r}; known are count, seed, pictures")
    try:
        numbers = {name: int(query[name]) for name in ("count", "seed") if name in query}
        tasks: dict[str, float] = {}
        for item in parts.path.strip("/").split(","):
            name, _, weight = item.partition("=")
            for task, share in _stage_or_task(name).items():
                tasks[task] = tasks.get(task, 0.0) + share * float(weight or 1)
    except ValueError as error:
        raise InputError(f"{path}: {error}; weights, count and seed are numbers") from None
    try:
        return Request(parts.netloc, tasks, images=query.get("pictures"), **numbers)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


class SyntheticSource(RecordSource):
    """Records with their media in memory: pictures and clips as arrays, the clip of a stream as the bytes of a file.

    Args:
      request: or its URL.
      blank: leave everything black: sizes and text are all that an index of lengths needs.
    """

    def __init__(self, request: Request | str, blank: bool = False):
        super().__init__()
        self.request = parse(request) if isinstance(request, str) else request
        self._blank = blank
        weights = np.array(list(self.request.tasks.values()), float)
        self._names = list(self.request.tasks)
        self._ends = np.cumsum(weights / weights.sum())
        open_image_pool(self.request.split, self.request.images)  # complain now, not in the first worker

    def __len__(self) -> int:
        return self.request.count

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(index)
        task, drawn = self.task_of(index), self.example(index)
        media = [self._content(one, bool(drawn.said)) for one in drawn.media]
        fields = drawn.record(media, task)
        clip = drawn.clip
        if clip is not None and not drawn.said:
            fields["timestamps"] = clip.times
        return Record(fields, f"{self.request.path}, sample {index + 1}")

    def task_of(self, index: int) -> str:
        """Name of a sample's task."""
        place = int(np.searchsorted(self._ends, index * _STRIDE % _PERIOD / _PERIOD, side="right"))
        return self._names[min(place, len(self._names) - 1)]

    def example(self, index: int) -> Example:
        """One sample before it is drawn."""
        return example(self.task_of(index), self.request.split, self.request.seed, index, self._bank)

    def outline(self) -> "SyntheticSource":
        """The same samples, black: of the same lengths and with the same stamp, several times as fast."""
        return SyntheticSource(self.request, blank=True)

    def fingerprint(self) -> list[Any]:
        """See `Source.stamp`."""
        request = self.request
        return [SCHEME, request.split, dict(request.tasks), request.count, request.seed, self._bank.digest, code_hash()]

    @property
    def _bank(self) -> ImagePool:
        return open_image_pool(self.request.split, self.request.images)

    def _content(self, medium: Scene | SyntheticVideo, as_file: bool) -> np.ndarray | bytes:
        if self._blank:
            size = (medium.height, medium.width, 3)
            shape = (medium.frames, *size) if isinstance(medium, SyntheticVideo) else size
            pixels = np.broadcast_to(np.zeros(1, np.uint8), shape)
        else:
            pixels = medium.pixels()
        return encode_video(pixels, "qtrle" if self._blank else "rawvideo") if as_file else pixels


@functools.cache
def code_hash() -> str:
    """Of the modules that draw: an index or a saved position does not outlive a change of them."""
    folder = pathlib.Path(__file__).parent
    files = sorted(path for path in folder.rglob("*.py") if path.stem not in _NOT_DRAWING)
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _stage_or_task(name: str) -> Mapping[str, float]:
    if name.startswith("stage") and name[5:].isdigit() and int(name[5:]) in STAGES:
        return STAGES[int(name[5:])]
    return {name: 1.0}
