"""How long samples are, how full rows get, and which budgets would suit them better."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.index import Index
from data_pipelines.lengths import UNKNOWN, compute_sample_size
from data_pipelines.mixture_dataset import MixtureDataset
from data_pipelines.packing import PackingEfficiency, epoch_order, packing_efficiency, plan_packing
from data_pipelines.sample_sizes import SampleSizes, compute_sample_sizes, concatenate
from data_pipelines.settings import DataSettings

# TFLOP of a forward pass: the decoder (2B) per token at 16,384, the tower per patch at 41k.
_DECODER_TFLOP = 43 / 16_384
_TOWER_TFLOP = 34 / 40_960
_PATCHES = (8_192, 16_384, 24_576, 32_768, 40_960, 49_152, 65_536)
_LOOKED_AT = 200_000  # samples, to judge a budget


@dataclasses.dataclass(frozen=True)
class Summary:
    """Of one data set; lengths are (mean, median, 99th percentile)."""

    name: str
    samples: int
    bad: int
    tokens: tuple[float, float, float]
    vision_tokens: tuple[float, float, float]
    patches: tuple[float, float, float]
    kept: float | None
    shrunk: int
    cut: int


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a row capacity would give: rows for these samples, how full, and TFLOP a sample."""

    patches: int
    rows: int
    fill: PackingEfficiency
    shrunk: int
    tflop: float


def summaries(mixture: MixtureDataset) -> list[Summary]:
    """One for each data set."""
    found = []
    for dataset, sample_sizes in zip(mixture.datasets, mixture.sample_sizes_by_dataset, strict=True):
        usable = sample_sizes.usable
        found.append(
            Summary(
                dataset.spec.name,
                len(sample_sizes),
                int((~usable).sum()),
                _spread(sample_sizes.tokens[usable]),
                _spread(sample_sizes.vision_tokens[usable]),
                _spread(sample_sizes.patches[usable]),
                _kept_share(dataset.index, mixture.settings, sample_sizes),
                sample_sizes.shrunk,
                sample_sizes.cut,
            )
        )
    return found


def epoch_fill(mixture: MixtureDataset, seed: int = 0) -> tuple[int, int, PackingEfficiency]:
    """Samples and rows of the first epoch, and how full the rows are."""
    rows = mixture.epoch_plan(seed, 0)
    return len(rows.samples), len(rows), packing_efficiency(rows, mixture.sample_sizes, mixture.settings.shape)


def suggest_budgets(mixture: MixtureDataset, patches: Sequence[int] = _PATCHES) -> list[Budget]:
    """The same samples planned with other patch budgets, the cheapest for each sample first."""
    found = []
    for budget in patches:
        settings = with_patches(mixture.settings, budget)
        sample_sizes = concatenate(
            [compute_sample_sizes(dataset.index, settings, dataset.spec.name) for dataset in mixture.datasets]
        )
        order = epoch_order([sample_sizes.usable], [1.0], 0, 0)[:_LOOKED_AT]
        rows = plan_packing(sample_sizes, order, settings.shape, (0, 0))
        row_tflop = settings.shape.length * _DECODER_TFLOP + budget * _TOWER_TFLOP
        tflop = len(rows) * row_tflop / max(len(order), 1)
        found.append(
            Budget(
                budget, len(rows), packing_efficiency(rows, sample_sizes, settings.shape), sample_sizes.shrunk, tflop
            )
        )
    return sorted(found, key=lambda budget: budget.tflop)


def with_patches(settings: DataSettings, patches: int) -> DataSettings:
    """The same settings with another capacity for patches in all."""
    shape = settings.shape
    vision = min(shape.length, patches if settings.processor.image_merge == 1 else patches // 4)
    each = patches // shape.vision_rows
    return dataclasses.replace(settings, shape=dataclasses.replace(shape, patches=each, vision_tokens=vision))


def _spread(values: np.ndarray) -> tuple[float, float, float]:
    if not len(values):
        return 0.0, 0.0, 0.0
    return float(values.mean()), float(np.median(values)), float(np.percentile(values, 99))


def _kept_share(index: Index, settings: DataSettings, sample_sizes: SampleSizes) -> float | None:
    """Vision tokens left by pruning, of the samples whose videos the index counted; None if there are none."""
    left = before = 0
    for number, lengths in enumerate(index):
        if sample_sizes.usable[number] and any(medium.kept != UNKNOWN for medium in lengths.media):
            media = tuple(dataclasses.replace(medium, kept=UNKNOWN) for medium in lengths.media)
            left += int(sample_sizes.vision_tokens[number])
            before += compute_sample_size(dataclasses.replace(lengths, media=media), settings).vision_tokens
    return left / before if before else None
