"""Opens the data sets of a mixture as one: any sample by its number, and its size in a packed row."""

import bisect
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from data_pipelines.index import Index, build_index, find_index
from data_pipelines.packing.lengths import SampleSize, compute_sample_size
from data_pipelines.packing.packing_plan import PackingPlan, epoch_order, plan_packing
from data_pipelines.packing.sample_sizes import SampleSizes, compute_sample_sizes, concatenate
from data_pipelines.packing.step_plan import NO_SAMPLE, StepPlan
from data_pipelines.sample_builder import SampleBuilder
from data_pipelines.sample_errors import MISSING, SampleError, SampleErrorLog
from data_pipelines.settings import fingerprint
from data_pipelines.sources import KINDS, RecordSource, open_source
from data_pipelines.sources.media_resolver import MediaResolver
from vl3_jax.config_tree import CHOICES, LIMITS, CheckedSettings, Limits
from vl3_jax.errors import InputError, SettingError
from vl3_jax.processing.packed_batch import Sample
from vl3_jax.processing.remote_media import RemotePolicy

# Epochs with packing plans of their own: many steps over little data start at once and in little memory.
_DISTINCT_EPOCHS, _MOST_EPOCHS = 1000, 20_000


@dataclasses.dataclass(frozen=True)
class DatasetSpec(CheckedSettings):
    """Describes a data set of a mixture.

    Attributes:
      name: Name of the data set.
      annotations: Annotation files or shards, see `sources.open_source`.
      media: Folder or URL that media paths are relative to.
      task: Name of its task; the training loss is reported per task.
      weight: How many times each sample is seen in an epoch, 0 to leave the data set out. It counts samples: a video
        of 10,000 tokens weighs as much as a caption.
      size: Expected number of samples; 0 if unknown.
      kind: Kind of source, one of `sources.KINDS`; empty infers it from the file name.
      index: Folder of the indices; empty is `<first annotation file>.vl3index`, or for remote files a folder of the
        user's cache.
      outside: Whether records may name media outside the media folder: absolute paths, `..`, file://.
      remote: Whether records may name media at public http(s):// addresses, which are fetched.
    """

    KEY: ClassVar[str] = "name"  # see `config_tree`

    name: str
    annotations: tuple[str, ...]
    media: str = ""
    task: str = ""
    weight: float = dataclasses.field(default=1.0, metadata={LIMITS: Limits(0, 1000)})
    size: int = dataclasses.field(default=0, metadata={LIMITS: Limits(0)})
    kind: str = dataclasses.field(default="", metadata={CHOICES: ("", *KINDS)})
    index: str = ""
    outside: bool = False
    remote: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not self.annotations or not all(self.annotations):
            raise SettingError("annotations", self.annotations, "name at least one file")

    @property
    def index_folder(self) -> str:
        """The folder of its indices: `index`, or a default beside the annotations or in the user's cache."""
        if self.index:
            return self.index
        if "://" in self.annotations[0]:
            cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
            return os.path.join(cache, "vl3_jax", "indices")
        return self.annotations[0].replace("*", "_") + ".vl3index"

    @property
    def media_resolver(self) -> MediaResolver:
        """Resolves the media that the records name."""
        return MediaResolver(self.media, self.outside, RemotePolicy() if self.remote else None)

    def open(self) -> RecordSource:
        """Opens the records of the data set."""
        return open_source(self.annotations, self.kind or None)


@dataclasses.dataclass(frozen=True)
class IndexedDataset:
    """A data set with its records and its index."""

    spec: DatasetSpec
    source: RecordSource
    index: Index


class MixtureDataset:
    """The data sets of a mixture, concatenated: sample numbers run through all of them, bad samples included.

    Args:
      datasets: The data sets in order.
      sample_builder: Builds samples from records; provides the tokenizer and the settings.

    Raises:
      InputError: There is no data set, or an index does not match its source.
    """

    def __init__(self, datasets: Sequence[IndexedDataset], sample_builder: SampleBuilder):
        if not datasets:
            raise InputError("no data sets; name at least one with its annotation file")
        for dataset in datasets:
            if len(dataset.index) != len(dataset.source):
                raise InputError(
                    f"{dataset.spec.name}: {len(dataset.source)} samples, but {len(dataset.index)} in the index; "
                    "index the data again"
                )
        self.datasets, self.sample_builder = list(datasets), sample_builder
        self.settings = sample_builder.settings
        self.tasks = sorted({dataset.spec.task for dataset in datasets})
        self._firsts = np.cumsum([0, *(len(dataset.index) for dataset in datasets)])
        self.planned: dict[str, PackingPlan] = {}  # packing plans of epochs, by a fingerprint of all they depend on

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @functools.cached_property
    def sample_sizes_by_dataset(self) -> list[SampleSizes]:
        """The sizes of the samples of each data set."""
        return [compute_sample_sizes(dataset.index, self.settings, dataset.spec.name) for dataset in self.datasets]

    @functools.cached_property
    def sample_sizes(self) -> SampleSizes:
        """The sizes of all samples, by sample number."""
        return concatenate(self.sample_sizes_by_dataset)

    def epoch_plan(self, seed: int, epoch: int) -> PackingPlan:
        """Returns the packing plan of an epoch, computed at the first call and then cached."""
        key = fingerprint([self.identity, seed, epoch])
        if key not in self.planned:
            usable = [sizes.usable for sizes in self.sample_sizes_by_dataset]
            order = epoch_order(usable, [dataset.spec.weight for dataset in self.datasets], seed, epoch)
            self.planned[key] = plan_packing(self.sample_sizes, order, self.settings, (seed, epoch))
        return self.planned[key]

    def step_plan(self, rows_per_step: int, epochs: int = 1, seed: int = 0) -> StepPlan:
        """Returns which rows belong to which step of a run; its epochs are planned at once, see `distinct_epochs`.

        Args:
          rows_per_step: Rows of a step on all hosts together.
          epochs: Number of epochs.
          seed: Seed of the sample order and of the row order.

        Raises:
          InputError: No row per step, no epoch, or no usable sample.
        """
        if rows_per_step < 1 or epochs < 1:
            raise InputError(f"{rows_per_step} rows per step and {epochs} epochs; give at least 1 of each")
        plans = [self.epoch_plan(seed, epoch) for epoch in range(min(epochs, self.distinct_epochs))]
        return StepPlan(plans, rows_per_step, seed, fingerprint([self.identity, rows_per_step, seed]), epochs)

    def epochs_of(self, steps: int, rows_per_step: int, seed: int = 0) -> int:
        """Returns how many epochs a number of steps take.

        Raises:
          InputError: No usable sample.
        """
        done = [0]  # steps after each epoch
        for epoch in range(self.distinct_epochs):
            done.append(done[-1] - -len(self.epoch_plan(seed, epoch)) // rows_per_step)
            if done[-1] >= steps:
                return epoch + 1
        if not done[-1]:
            raise InputError(NO_SAMPLE)
        rounds, last = divmod(steps - 1, done[-1])
        return rounds * self.distinct_epochs + bisect.bisect_left(done, last + 1)

    @property
    def distinct_epochs(self) -> int:
        """How many epochs have plans of their own; later ones repeat these.

        They are enough for every sample of a data set with a small weight to occur.
        """
        least = min((dataset.spec.weight for dataset in self.datasets if dataset.spec.weight), default=1)
        return min(max(_DISTINCT_EPOCHS, math.ceil(1 / least)), _MOST_EPOCHS)

    def sample_size(self, number: int) -> SampleSize:
        """Returns the size of a usable sample."""
        dataset, local = self.locate(number)
        return compute_sample_size(dataset.index[local], self.settings)

    def locate(self, number: int) -> tuple[IndexedDataset, int]:
        """Returns the data set of a sample number, and the sample's number within that data set."""
        rank = int(np.searchsorted(self._firsts, number, side="right")) - 1
        return self.datasets[rank], number - int(self._firsts[rank])

    def sample(self, number: int, seed: Sequence[int]) -> Sample | SampleError:
        """Reads one usable sample; equal seeds give equal samples."""
        dataset, local = self.locate(number)
        try:
            record = dataset.source[local]
        except InputError as error:  # the annotation file itself was removed
            return SampleError(MISSING, dataset.spec.name, str(error), dataset.spec.annotations[0])
        media, task = dataset.spec.media_resolver, self.tasks.index(dataset.spec.task)
        return self.sample_builder.sample(record, media, self.sample_size(number), [*seed, number], task)

    def log(self) -> SampleErrorLog:
        """Returns the errors known before anything is read: those in the indices, and samples that fit no row."""
        log = SampleErrorLog()
        for dataset, sizes in zip(self.datasets, self.sample_sizes_by_dataset, strict=True):
            log.add([*dataset.index.errors(), *sizes.errors], len(dataset.index))
        return log

    @functools.cached_property
    def identity(self) -> str:
        """A fingerprint of everything that the order and the content of the samples depend on."""
        shape = dataclasses.asdict(self.settings.shape)
        config = dataclasses.asdict(self.settings.processor) | {"threads": 0}
        settings = self.settings
        parts: list[Any] = [shape, config, settings.lengths, settings.max_frame_patches, settings.trainer_streams]
        parts += [[d.spec.name, d.spec.weight, d.spec.task, d.index.folder.name] for d in self.datasets]
        return fingerprint(parts)

    def __reduce__(self):
        return MixtureDataset, (self.datasets, self.sample_builder)


def open_mixture(
    specs: Sequence[DatasetSpec],
    sample_builder: SampleBuilder,
    build: bool = False,
    on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> MixtureDataset:
    """Opens data sets with their indices; an index that counts kept vision tokens is preferred.

    Args:
      specs: The data sets of the mixture.
      sample_builder: Provides the tokenizer and the settings.
      build: Build missing indices (without counts of kept tokens) instead of raising.
      on_progress: Called with the name of the data set, the number of samples indexed and the total.

    Raises:
      InputError: Data sets are missing or not indexed; names all of them.
    """
    require_present(specs)
    datasets, unindexed = [], []
    for spec in specs:
        source = spec.open()
        index = find_index(source, sample_builder, spec.index_folder, kept=(True, False))
        if build and (index is None or index.is_stale(spec.media_resolver)):
            media, report = spec.media_resolver, functools.partial(on_progress, spec.name)
            kept = index is not None and index.kept
            index = build_index(source, media, sample_builder, spec.index_folder, kept, on_progress=report, wait=True)
        if index is None:
            unindexed.append(spec.name)
        else:
            datasets.append(IndexedDataset(spec, source, index))
    if unindexed:
        raise InputError(
            f"not indexed with these settings: {', '.join(unindexed)}; run `vl3 data index` with the same configuration"
        )
    return MixtureDataset(datasets, sample_builder)


def missing_files(specs: Sequence[DatasetSpec]) -> dict[str, str]:
    """Maps the name of each data set that lacks an annotation file to its first missing file."""
    missing = {}
    for spec in specs:
        for path in spec.annotations:
            local = path.split(":")[0] if spec.kind == "tfds" else path
            if "://" not in path and "*" not in path and not os.path.exists(os.path.expanduser(local)):
                missing.setdefault(spec.name, path)
    return missing


def require_present(specs: Sequence[DatasetSpec]) -> None:
    """Raises one InputError that names all missing data sets."""
    missing = missing_files(specs)
    if missing:
        listed = ", ".join(f"{name} ({path})" for name, path in missing.items())
        raise InputError(
            f"{len(missing)} of {len(specs)} data sets are missing: {listed}; download them or leave them out"
        )
