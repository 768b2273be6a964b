"""Statistics of a mixture: lengths of its samples, packing efficiency, and the cost of other patch budgets."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.index import Index
from data_pipelines.lengths import UNKNOWN, compute_sample_size
from data_pipelines.mixture_dataset import MixtureDataset
from data_pipelines.packing import PackingEfficiency, epoch_order, packing_efficiency, plan_packing
from data_pipelines.sample_sizes import SampleSizes, compute_sample_sizes, concatenate
from data_pipelines.settings import DataSettings

# TFLOP of a forward pass: the decoder (2B) per token at 16,384 tokens, the vision tower per patch at 40,960 patches.
_DECODER_TFLOP = 43 / 16_384
_TOWER_TFLOP = 34 / 40_960
_PATCHES = (8_192, 16_384, 24_576, 32_768, 40_960, 49_152, 65_536)
_MAX_SAMPLES = 200_000  # samples that are packed to judge a patch budget


@dataclasses.dataclass(frozen=True)
class DatasetSummary:
    """Lengths of the samples of one data set.

    Attributes:
      name: Name of the data set.
      samples: Number of samples, bad ones included.
      bad: Number of samples that are bad or too long.
      tokens: Mean, median and 99th percentile of the tokens of a usable sample.
      vision_tokens: The same of its vision tokens.
      patches: The same of its patches.
      kept: Share of vision tokens kept by pruning in samples with videos; None if the index does not count them.
      shrunk: Number of samples with fewer vision tokens than the settings allow.
      cut: Number of samples that are cut at their end.
    """

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
class PatchBudget:
    """What a capacity for patches would lead to.

    Attributes:
      patches: Patches of a row.
      rows: Number of rows for the samples of the mixture, or for the first 200,000 of them.
      fill: How full the rows are.
      shrunk: Number of samples with fewer vision tokens than the settings allow.
      tflop: TFLOP of a forward pass per sample.
    """

    patches: int
    rows: int
    fill: PackingEfficiency
    shrunk: int
    tflop: float


def summarise_datasets(mixture: MixtureDataset) -> list[DatasetSummary]:
    """Returns a summary of each data set."""
    summaries = []
    for dataset, sizes in zip(mixture.datasets, mixture.sample_sizes_by_dataset, strict=True):
        usable = sizes.usable
        summaries.append(
            DatasetSummary(
                dataset.spec.name,
                len(sizes),
                int((~usable).sum()),
                _spread(sizes.tokens[usable]),
                _spread(sizes.vision_tokens[usable]),
                _spread(sizes.patches[usable]),
                _kept_share(dataset.index, mixture.settings, sizes),
                sizes.shrunk,
                sizes.cut,
            )
        )
    return summaries


def epoch_efficiency(mixture: MixtureDataset, seed: int = 0) -> tuple[int, int, PackingEfficiency]:
    """Returns the number of samples and of rows of the first epoch, and the packing efficiency of the rows."""
    plan = mixture.epoch_plan(seed, 0)
    return len(plan.samples), len(plan), packing_efficiency(plan, mixture.sample_sizes, mixture.settings.shape)


def suggest_budgets(mixture: MixtureDataset, patches: Sequence[int] = _PATCHES) -> list[PatchBudget]:
    """Packs the same samples under other patch budgets.

    Args:
      mixture: The data.
      patches: The budgets, in patches of a row.

    Returns:
      One result for each budget, sorted by cost per sample.
    """
    budgets = []
    for budget in patches:
        settings = with_patches(mixture.settings, budget)
        sizes = concatenate(
            [compute_sample_sizes(dataset.index, settings, dataset.spec.name) for dataset in mixture.datasets]
        )
        order = epoch_order([sizes.usable], [1.0], 0, 0)[:_MAX_SAMPLES]
        plan = plan_packing(sizes, order, settings.shape, (0, 0))
        row_tflop = settings.shape.length * _DECODER_TFLOP + budget * _TOWER_TFLOP
        tflop = len(plan) * row_tflop / max(len(order), 1)
        efficiency = packing_efficiency(plan, sizes, settings.shape)
        budgets.append(PatchBudget(budget, len(plan), efficiency, sizes.shrunk, tflop))
    return sorted(budgets, key=lambda budget: budget.tflop)


def with_patches(settings: DataSettings, patches: int) -> DataSettings:
    """Returns the settings with another patch capacity, `patches` in all vision rows of a text row together."""
    shape = settings.shape
    vision_tokens = min(shape.length, patches if settings.processor.image_merge == 1 else patches // 4)
    per_vision_row = patches // shape.vision_rows
    return dataclasses.replace(
        settings, shape=dataclasses.replace(shape, patches=per_vision_row, vision_tokens=vision_tokens)
    )


def _spread(values: np.ndarray) -> tuple[float, float, float]:
    if not len(values):
        return 0.0, 0.0, 0.0
    return float(values.mean()), float(np.median(values)), float(np.percentile(values, 99))


def _kept_share(index: Index, settings: DataSettings, sizes: SampleSizes) -> float | None:
    """Returns the share of vision tokens kept by pruning, over the usable samples whose videos the index counted."""
    after = before = 0
    for number, lengths in enumerate(index):
        if sizes.usable[number] and any(medium.kept != UNKNOWN for medium in lengths.media):
            media = tuple(dataclasses.replace(medium, kept=UNKNOWN) for medium in lengths.media)
            after += int(sizes.vision_tokens[number])
            before += compute_sample_size(dataclasses.replace(lengths, media=media), settings).vision_tokens
    return after / before if before else None
