"""A record source whose samples are generated when they are read, without files and in any number.

    synthetic://train/digit?count=20000&seed=3              one task
    synthetic://train/box,box_of_two=2?count=5000           two tasks, the second twice as often
    synthetic://train/stage2?count=100000                   the tasks of a training stage, in its shares
    synthetic://test/digit?count=200&images=mine.npz        with other source images

Sample i is a pure function of split, tasks, seed and i; the count only sets the length of the source.
"""

import dataclasses
import functools
import hashlib
import pathlib
import urllib.parse
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.sources.base import RecordSource
from data_pipelines.synthetic.encoding import encode_video
from data_pipelines.synthetic.image_pool import ImagePool, open_image_pool
from data_pipelines.synthetic.registry import check_tasks, example
from data_pipelines.synthetic.samples import Example
from data_pipelines.synthetic.scenes import Scene, SyntheticVideo
from data_pipelines.synthetic.stages import STAGES
from vl3_jax.errors import InputError
from vl3_jax.storage.file_digests import FileDigests

SCHEME = "synthetic"
# Modules whose code does not affect the content of the samples of a given request.
_NOT_HASHED = (
    "__init__",
    "__main__",
    "dataset_writer",
    "mixture",
    "parsing",
    "scoring",
    "source",
    "stages",
    "tokenizer",
)
_STAGES = {f"stage{number}": shares for number, shares in STAGES.items()}
# 2**32 divided by the golden ratio: every range of consecutive samples has all tasks in proportion.
_STRIDE, _PERIOD = 2_654_435_769, 2**32


@dataclasses.dataclass(frozen=True)
class SyntheticSpec:
    """What a source holds.

    Attributes:
      split: "train", "dev" or "test".
      tasks: Weight of each task.
      count: Number of samples.
      seed: Random seed of the data set.
      images: An npz file of source images to use instead of the split's own.
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
            given = f"synthetic data with count {self.count} and seed {self.seed}"
            raise InputError(f"{given}: give a count of 1 or more and a seed of 0 or more")

    @property
    def url(self) -> str:
        """The `synthetic://` URL, from which `parse_url` gives an equal object."""
        tasks = ",".join(name if weight == 1 else f"{name}={weight:g}" for name, weight in self.tasks.items())
        query = f"count={self.count}&seed={self.seed}"
        if self.images:
            query += f"&images={urllib.parse.quote(self.images, safe='/')}"
        return f"{SCHEME}://{self.split}/{tasks}?{query}"


def parse_url(url: str) -> SyntheticSpec:
    """Parses a `synthetic://` URL.

    Raises:
      InputError: The URL is malformed, or names an unknown task or setting.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != SCHEME or not parts.netloc or not parts.path.strip("/"):
        raise InputError(f"{url}: give synthetic data as {SCHEME}://train/TASK,...?count=1000&seed=0")
    query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(set(query) - {"count", "seed", "images"})
    if unknown:
        raise InputError(f"{url}: unknown setting {unknown[0]!r}; known are count, seed, images")
    try:
        numbers = {name: int(query[name]) for name in ("count", "seed") if name in query}
        tasks: dict[str, float] = {}
        for item in parts.path.strip("/").split(","):
            name, _, weight = item.partition("=")
            for task, share in _STAGES.get(name, {name: 1.0}).items():
                tasks[task] = tasks.get(task, 0.0) + share * float(weight or 1)
        return SyntheticSpec(parts.netloc, tasks, images=query.get("images"), **numbers)
    except ValueError as error:
        raise InputError(f"{url}: {error}; weights, count and seed are numbers") from None
    except InputError as error:
        raise InputError(f"{url}: {error}") from None


class SyntheticSource(RecordSource):
    """Generates records with their media in memory.

    Images and videos are arrays; the video of a live stream is the content of a video file.

    Args:
      spec: What the source holds, or its URL.
      blank: Leave all media black. Sizes and text are unchanged, which is all that an index of lengths needs.

    Raises:
      InputError: The URL is malformed, the split is unknown, or the source images cannot be read.
    """

    def __init__(self, spec: SyntheticSpec | str, blank: bool = False):
        super().__init__()
        self.spec = parse_url(spec) if isinstance(spec, str) else spec
        self._blank = blank
        weights = np.array(list(self.spec.tasks.values()), float)
        self._names = list(self.spec.tasks)
        self._ends = np.cumsum(weights / weights.sum())
        open_image_pool(self.spec.split, self.spec.images)  # fails here rather than in the first worker process

    def __len__(self) -> int:
        return self.spec.count

    def where(self, index: int) -> str:
        return f"{self.spec.url}, sample {index + 1}"

    def read(self, index: int) -> dict[str, Any]:
        task, sample = self.task_of(index), self.example(index)
        is_stream = bool(sample.utterances)
        fields = sample.record([self._content(medium, is_stream) for medium in sample.media], task)
        if sample.video is not None and not is_stream:
            fields["timestamps"] = sample.video.times
        return fields

    def task_of(self, index: int) -> str:
        """Returns the name of a sample's task."""
        rank = int(np.searchsorted(self._ends, index * _STRIDE % _PERIOD / _PERIOD, side="right"))
        return self._names[min(rank, len(self._names) - 1)]

    def example(self, index: int) -> Example:
        """Returns a sample whose media are not rendered yet."""
        return example(self.task_of(index), self.spec.split, self.spec.seed, index, self._image_pool)

    def outline(self) -> "SyntheticSource":
        """Returns the same samples with black media: equal lengths and fingerprint, several times as fast to read."""
        return SyntheticSource(self.spec, blank=True)

    def fingerprint(self, digests: FileDigests) -> list[Any]:
        """Returns JSON values that identify the content, including the hash of the generator's code."""
        spec = self.spec
        return [SCHEME, spec.split, dict(spec.tasks), spec.count, spec.seed, self._image_pool.digest, code_hash()]

    @property
    def _image_pool(self) -> ImagePool:
        return open_image_pool(self.spec.split, self.spec.images)

    def _content(self, medium: Scene | SyntheticVideo, as_file: bool) -> np.ndarray | bytes:
        if self._blank:
            size = (medium.height, medium.width, 3)
            shape = (medium.num_frames, *size) if isinstance(medium, SyntheticVideo) else size
            pixels = np.broadcast_to(np.zeros(1, np.uint8), shape)
        else:
            pixels = medium.pixels()
        return encode_video(pixels, "qtrle" if self._blank else "rawvideo") if as_file else pixels


@functools.cache
def code_hash() -> str:
    """Returns a hash of the modules that generate samples; a change of them invalidates indexes and data states."""
    files = sorted(path for path in pathlib.Path(__file__).parent.rglob("*.py") if path.stem not in _NOT_HASHED)
    return hashlib.blake2b(b"".join(path.read_bytes() for path in files), digest_size=8).hexdigest()
