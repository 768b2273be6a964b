"""Mixtures as configuration: which data sets, how often, and how records become rows.

A file of `configs/data/` has `get_config()`, which returns `mixture(...)`: an `ml_collections.ConfigDict` with the
settings below and `datasets`, each {task, annotations, media, weight, size, kind, index}. Relative paths of a data set
are below `root`; `{seed}` in an annotation path stands for the setting `seed`.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import ml_collections

from data_pipelines.mixture_dataset import DatasetSpec
from data_pipelines.settings import TRAINING_LENGTH, TRAINING_MAX_FRAME_PATCHES, TRAINING_MAX_TOKENS, DataSettings
from vl3_jax import config_file
from vl3_jax.errors import InputError
from vl3_jax.processing.diff_pruning import DEFAULT_THRESHOLD
from vl3_jax.processing.packed_batch import BatchShape
from vl3_jax.processing.processor_config import ProcessorConfig

ANNOTATIONS = "annotations.jsonl"
SEED = "{seed}"


@dataclasses.dataclass(frozen=True)
class Group:
    """Data sets of one task.

    Attributes:
      task: its name.
      amount: samples of all together.
      names: of the data sets; each is a folder below the root with `annotations.jsonl` and its media.
      sizes: samples of those for which it is published.
    """

    task: str
    amount: int
    names: Sequence[str]
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)


def mixture(groups: Sequence[Group] = (), **settings: Any) -> ml_collections.ConfigDict:
    """A configuration with all its settings.

    Args:
      groups: data sets by task.
      **settings: other values than those below.

    Raises:
      InputError: an unknown setting, or a name given twice.
    """
    config = ml_collections.ConfigDict(
        {
            "root": "data",
            "seed": 0,  # of data that is drawn
            "length": TRAINING_LENGTH,
            "patches": 40_960,
            "vision_rows": 1,
            "vision_tokens": 0,  # 0: as many as the patches can give, at most the length
            "samples": 64,
            "max_tokens": TRAINING_MAX_TOKENS,
            "min_tokens": ProcessorConfig.min_tokens,
            "max_frame_patches": TRAINING_MAX_FRAME_PATCHES,
            "image_merge": 1,
            "video_merge": 2,
            "fps": ProcessorConfig.fps,
            "max_frames": ProcessorConfig.max_frames,
            "prune_threshold": DEFAULT_THRESHOLD,  # 0: no pruning
            "preprocess": "official",
            "trainer_streams": False,
            "amounts": {group.task: group.amount for group in groups},
            "datasets": {},
        }
    )
    for group in groups:
        for name in group.names:
            if name in config.datasets:
                raise InputError(f"{name}: twice in one mixture; give one of them another name")
            config.datasets[name] = {
                "task": group.task,
                "annotations": (f"{name}/{ANNOTATIONS}",),
                "media": name,
                "weight": 1.0,
                "size": group.sizes.get(name, 0),  # 0: not published
                "kind": "",
                "index": "",
            }
    for key, value in settings.items():
        config_file.set_value(config, key, value)
    return config


def data_settings(config: ml_collections.ConfigDict) -> DataSettings:
    """How the records of this configuration become rows."""
    per_token = 1 if config.image_merge == 1 else 4
    possible = config.patches * config.vision_rows // per_token
    shape = BatchShape(
        config.length,
        config.patches,
        config.vision_tokens or min(config.length, possible),
        config.vision_rows,
        config.samples,
    )
    processor = ProcessorConfig(
        image_merge=config.image_merge,
        video_merge=config.video_merge,
        min_tokens=config.min_tokens,
        max_tokens=config.max_tokens,
        fps=config.fps,
        max_frames=config.max_frames,
        preprocess=config.preprocess,
        prune_threshold=config.prune_threshold or None,
        threads=1,
    )
    return DataSettings(shape, processor, config.max_frame_patches, config.trainer_streams)


def dataset_specs(config: ml_collections.ConfigDict) -> list[DatasetSpec]:
    """The data sets of a configuration that are used at all."""
    return [
        DatasetSpec(
            name,
            tuple(_below(config.root, path.replace(SEED, str(config.seed))) for path in one.annotations),
            _below(config.root, one.media),
            one.task,
            float(one.weight),
            one.size or None,
            one.kind or None,
            _below(config.root, one.index) if one.index else None,
        )
        for name, one in config.datasets.items()
        if one.weight
    ]


def _below(root: str, path: str) -> str:
    if not root or os.path.isabs(path) or "://" in path:
        return path
    return f"{root.rstrip('/')}/{path}" if "://" in root else os.path.join(root, path)
