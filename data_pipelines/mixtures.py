"""Mixtures: the data sets of a training run, and how their records become rows.

A file of `configs/data/` has `get_config()`, which returns `mixture(...)`. Relative paths of a data set are below
`root`; `{seed}` in an annotation path stands for the setting `seed`.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.mixture_dataset import DatasetSpec
from data_pipelines.settings import DataSettings
from vl3_jax import config_file, config_tree
from vl3_jax.config_tree import LIMITS, SEED, Limits
from vl3_jax.errors import InputError, SettingError
from vl3_jax.processing.packed_batch import BatchShape
from vl3_jax.processing.processor_config import ProcessorConfig

ANNOTATIONS = "annotations.jsonl"
SEED_PLACE = "{seed}"
_TOKENS = Limits(1, 2**20)  # of a row
_PATCHES = Limits(1, 2**22)  # of a row: 2.5 GB of pixels


@dataclasses.dataclass(frozen=True)
class MixtureConfig(ProcessorConfig):
    """Data sets and the settings of their processing; those of the processor are among them.

    Attributes:
      max_tokens: Budget of vision tokens before pruning of one sample (official) or one item (native).
      threads: Threads of the video decoder; several samples are read at a time.
      root: Folder or URL that relative paths of the data sets are below.
      seed: Seed of synthetic data.
      length: Largest number of tokens of a row, and of a sample.
      shorter_lengths: Tokens of shorter rows, if below `length`. Each step has rows of one length, and a program of its
        own for each; samples that fit the shortest rows are packed into them, or with longer samples.
      patches: Patches of a vision row.
      vision_rows: Vision rows of each row; no frame crosses from one to the next.
      vision_tokens: Vision tokens of a row; 0 is as many as its patches can give, at most `length`.
      samples: Largest number of samples of a row.
      max_frame_patches: Largest number of patches of an image or frame.
      trainer_streams: Whether live streams are written and supervised as by the official trainer.
      amounts: Samples of each task's data sets together, as published.
      datasets: The data sets by name.
    """

    # The paper's budgets in training.
    max_tokens: int = 10_240
    threads: int = 1
    root: str = "data"
    seed: int = dataclasses.field(default=0, metadata={LIMITS: SEED})
    length: int = dataclasses.field(default=16_384, metadata={LIMITS: _TOKENS})
    shorter_lengths: tuple[int, ...] = dataclasses.field(
        default=DataSettings.shorter_lengths, metadata={LIMITS: _TOKENS}
    )
    patches: int = dataclasses.field(default=40_960, metadata={LIMITS: _PATCHES})
    vision_rows: int = dataclasses.field(default=BatchShape.vision_rows, metadata={LIMITS: Limits(1, 1024)})
    vision_tokens: int = dataclasses.field(default=0, metadata={LIMITS: Limits(0, _TOKENS.most)})
    samples: int = dataclasses.field(default=BatchShape.samples, metadata={LIMITS: Limits(1, 65_536)})
    max_frame_patches: int = dataclasses.field(default=DataSettings.max_frame_patches, metadata={LIMITS: _PATCHES})
    trainer_streams: bool = DataSettings.trainer_streams
    amounts: Mapping[str, int] = dataclasses.field(default_factory=dict, metadata={LIMITS: Limits(0)})
    datasets: Mapping[str, DatasetSpec] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        if self.patches * self.vision_rows not in _PATCHES:
            advice = f"give at most {_PATCHES.most // self.patches} rows of {self.patches} patches"
            raise SettingError("vision_rows", self.vision_rows, advice)
        if self.vision_tokens > self.length:
            raise SettingError("vision_tokens", self.vision_tokens, f"give at most length, {self.length}")


@dataclasses.dataclass(frozen=True)
class Group:
    """Data sets of one task.

    Attributes:
      task: Name of the task.
      amount: Samples of all data sets together.
      names: Names of the data sets; each is a folder below the root with `annotations.jsonl` and its media.
      sizes: Samples of those data sets for which the number is published.
    """

    task: str
    amount: int
    names: Sequence[str]
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)


def mixture(groups: Sequence[Group] = (), **settings: Any) -> MixtureConfig:
    """Builds a mixture.

    Args:
      groups: Data sets by task.
      **settings: Values of `MixtureConfig` that differ from its defaults.

    Raises:
      InputError: A data set named twice, or an impossible value.
    """
    datasets: dict[str, DatasetSpec] = {}
    for group in groups:
        for name in group.names:
            if name in datasets:
                raise InputError(f"{name}: twice in one mixture; give one of them another name")
            datasets[name] = DatasetSpec(
                name, (f"{name}/{ANNOTATIONS}",), media=name, task=group.task, size=group.sizes.get(name, 0)
            )
    return MixtureConfig(amounts={group.task: group.amount for group in groups}, datasets=datasets, **settings)


def load(name: str | os.PathLike, changes: Sequence[str] = ()) -> MixtureConfig:
    """Loads the mixture of a configuration, that of a training run too; see `config_file.load`."""
    config = config_file.load(name, changes)
    return config_tree.from_tree(MixtureConfig, *((config.data, "data.") if "data" in config else (config,)))


def data_settings(config: MixtureConfig) -> DataSettings:
    """Returns how the records of a mixture become rows."""
    most = min(config.length, config.patches * config.vision_rows // config.image_merge**2)
    shape = BatchShape(config.length, config.patches, config.vision_tokens or most, config.vision_rows, config.samples)
    processor = ProcessorConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(ProcessorConfig)})
    return DataSettings(shape, processor, config.shorter_lengths, config.max_frame_patches, config.trainer_streams)


def dataset_specs(config: MixtureConfig) -> list[DatasetSpec]:
    """Returns the data sets of a mixture whose weight is not 0, with their full paths."""
    return [with_full_paths(config, spec) for spec in config.datasets.values() if spec.weight]


def with_full_paths(config: MixtureConfig, spec: DatasetSpec) -> DatasetSpec:
    """Returns a data set with the full paths of its files; relative ones are below the root of the mixture."""

    def below(path: str) -> str:
        if "://" in path or os.path.isabs(path) or not config.root:
            return path
        return f"{config.root.rstrip('/')}/{path}" if "://" in config.root else os.path.join(config.root, path)

    return dataclasses.replace(
        spec,
        annotations=tuple(below(path.replace(SEED_PLACE, str(config.seed))) for path in spec.annotations),
        media=below(spec.media),
        index=spec.index and below(spec.index),
    )
