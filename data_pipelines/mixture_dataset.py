"""The data sets of a mixture, opened: any sample by its number, and what it takes of a row."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_pipelines.index import Index, find_index, index_key
from data_pipelines.indexing import build_index, tokenizer_hash
from data_pipelines.lengths import SampleSize, compute_sample_size
from data_pipelines.media_resolver import MediaResolver
from data_pipelines.packing import PackingPlan, epoch_order, plan_packing
from data_pipelines.sample_builder import SampleBuilder
from data_pipelines.sample_errors import SampleError, SampleErrorLog
from data_pipelines.sample_sizes import SampleSizes, compute_sample_sizes, concatenate
from data_pipelines.settings import fingerprint
from data_pipelines.sources import RecordSource, open_source
from vl3_jax.errors import InputError
from vl3_jax.processing.packed_batch import Sample


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """A data set of a mixture.

    Attributes:
      name: of the data set.
      annotations: files, see `sources.open_source`.
      media: folder or URL that media paths are relative to.
      task: what it teaches; the loss is told for each task.
      weight: how many times each sample is seen in an epoch. It counts samples: a video of 10,000 tokens weighs as
        much as a caption.
      size: samples expected; None is unknown.
      kind: of `sources.KINDS`; None tells it by the file's ending.
      index: folder for its indices; None is `<first annotation file>.vl3index`, or for remote files a folder of the
        user's cache.
    """

    name: str
    annotations: tuple[str, ...]
    media: str = ""
    task: str = ""
    weight: float = 1.0
    size: int | None = None
    kind: str | None = None
    index: str | None = None

    @property
    def index_folder(self) -> str:
        """Where its indices lie: where it says, beside its annotations, or in the user's cache if they are remote."""
        if self.index:
            return self.index
        if "://" in self.annotations[0]:
            cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
            return os.path.join(cache, "vl3_jax", "indices")
        return self.annotations[0].replace("*", "_") + ".vl3index"

    def open(self) -> RecordSource:
        """Its records."""
        return open_source(self.annotations, self.kind)


@dataclasses.dataclass(frozen=True)
class IndexedDataset:
    """An entry with its records and index."""

    spec: DatasetSpec
    source: RecordSource
    index: Index

    @property
    def media(self) -> MediaResolver:
        return MediaResolver(self.spec.media)


class MixtureDataset:
    """Data sets behind one another: sample numbers count through all of them, bad ones included."""

    def __init__(self, datasets: Sequence[IndexedDataset], examples: SampleBuilder):
        if not datasets:
            raise InputError("no data sets; name at least one with its annotation file")
        for dataset in datasets:
            if dataset.spec.weight < 0:
                raise InputError(f"{dataset.spec.name}: weight {dataset.spec.weight}; give 0 or more")
            if len(dataset.index) != len(dataset.source):
                raise InputError(f"{dataset.spec.name}: {len(dataset.source)} samples, indexed {len(dataset.index)}")
        self.datasets, self.examples = list(datasets), examples
        self.settings = examples.settings
        self.tasks = sorted({dataset.spec.task for dataset in datasets})
        self._ends = list(itertools.accumulate(len(dataset.index) for dataset in datasets))
        self.planned: dict[str, PackingPlan] = {}  # rows of epochs, by what they follow from

    def __len__(self) -> int:
        return self._ends[-1]

    @functools.cached_property
    def sample_sizes_by_dataset(self) -> list[SampleSizes]:
        """What samples take of a row, by data set."""
        return [compute_sample_sizes(dataset.index, self.settings, dataset.spec.name) for dataset in self.datasets]

    @functools.cached_property
    def sample_sizes(self) -> SampleSizes:
        """The same of all, by sample number."""
        return concatenate(self.sample_sizes_by_dataset)

    def epoch_plan(self, seed: int, epoch: int) -> PackingPlan:
        """The rows of an epoch, planned when first asked for."""
        key = fingerprint([self.identity(), seed, epoch])
        if key not in self.planned:
            usable = [sample_sizes.usable for sample_sizes in self.sample_sizes_by_dataset]
            order = epoch_order(usable, [dataset.spec.weight for dataset in self.datasets], seed, epoch)
            self.planned[key] = plan_packing(self.sample_sizes, order, self.settings.shape, (seed, epoch))
        return self.planned[key]

    def room(self, number: int) -> SampleSize:
        """Of one usable sample."""
        dataset, local = self.locate(number)
        return compute_sample_size(dataset.index[local], self.settings)

    def locate(self, number: int) -> tuple[IndexedDataset, int]:
        """The data set of a sample number, and its number there."""
        rank = int(np.searchsorted(self._ends, number, side="right"))
        return self.datasets[rank], number - (self._ends[rank - 1] if rank else 0)

    def sample(self, number: int, seed: Sequence[int]) -> Sample | SampleError:
        """Reads one usable sample; the same for equal seeds."""
        dataset, local = self.locate(number)
        task = self.tasks.index(dataset.spec.task)
        place = compute_sample_size(dataset.index[local], self.settings)
        try:
            record = dataset.source[local]
        except InputError as error:  # the file itself went away
            return SampleError("missing file", dataset.spec.name, str(error), dataset.spec.annotations[0])
        return self.examples.sample(record, dataset.media, place, [*seed, number], task)

    def log(self) -> SampleErrorLog:
        """What is known to be bad before anything is read: from the indices, and what fits no row."""
        log = SampleErrorLog()
        for dataset, sample_sizes in zip(self.datasets, self.sample_sizes_by_dataset, strict=True):
            log.add(dataset.index.problems(), len(dataset.index))
            log.add(sample_sizes.problems, 0)
        return log

    def identity(self) -> str:
        """A fingerprint of everything that the order and content of the samples depend on."""
        shape = dataclasses.asdict(self.settings.shape)
        config = dataclasses.asdict(self.settings.processor) | {"threads": 0}
        parts: list[Any] = [shape, config, self.settings.max_frame_patches, self.settings.trainer_streams]
        parts += [[d.spec.name, d.spec.weight, d.spec.task, d.index.folder.name] for d in self.datasets]
        return fingerprint(parts)

    def __getstate__(self) -> dict[str, Any]:
        return {"datasets": self.datasets, "examples": self.examples}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


def open_mixture(
    specs: Sequence[DatasetSpec],
    examples: SampleBuilder,
    build: bool = False,
    workers: int = 0,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> MixtureDataset:
    """Opens data sets with their indices; one with counts of kept tokens is preferred.

    Args:
      entries: of the mixture.
      examples: with tokenizer and settings.
      build: make indices that are missing (without kept counts), instead of raising.
      workers: processes that make them.
      on_progress: told the data set, how many of its samples are indexed, of how many.

    Raises:
      InputError: names every data set that is missing or not indexed.
    """
    require_present(specs)
    datasets, unindexed = [], []
    tokenizer = tokenizer_hash(examples)
    for spec in specs:
        source = spec.open()
        keys = [index_key(source.fingerprint(), tokenizer, examples.settings, kept) for kept in (True, False)]
        index = find_index(spec.index_folder, keys)
        if index is None and build:
            report = functools.partial(on_progress, spec.name)
            media = MediaResolver(spec.media)
            index = build_index(source, media, examples, spec.index_folder, workers=workers, on_progress=report)
        if index is None:
            unindexed.append(spec.name)
        else:
            datasets.append(IndexedDataset(spec, source, index))
    if unindexed:
        raise InputError(
            f"not indexed with these settings: {', '.join(unindexed)}; run `vl3 data index` with the same configuration"
        )
    return MixtureDataset(datasets, examples)


def missing_files(specs: Sequence[DatasetSpec]) -> dict[str, str]:
    """Entries whose annotation files are not there, each with the first such file."""
    found = {}
    for spec in specs:
        for path in spec.annotations:
            local = path.split(":")[0] if spec.kind == "tfds" else path
            if "://" not in path and "*" not in path and not os.path.exists(os.path.expanduser(local)):
                found[spec.name] = path
                break
    return found


def require_present(specs: Sequence[DatasetSpec]) -> None:
    """InputError with all that is missing at once."""
    absent = missing_files(specs)
    if absent:
        listed = ", ".join(f"{name} ({path})" for name, path in absent.items())
        raise InputError(
            f"{len(absent)} of {len(specs)} data sets are not there: {listed}; fetch them or leave them out"
        )
