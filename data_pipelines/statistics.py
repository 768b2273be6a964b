"""How long samples are, how full rows get, and which budgets would suit them better."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.corpus import Corpus
from data_pipelines.index import Index
from data_pipelines.lengths import UNKNOWN, room
from data_pipelines.planning import Fill, epoch_order, fill_of, plan_rows
from data_pipelines.rooms import Rooms, joined, rooms_of
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
    fill: Fill
    shrunk: int
    tflop: float


def summaries(corpus: Corpus) -> list[Summary]:
    """One for each data set."""
    found = []
    for dataset, rooms in zip(corpus.datasets, corpus.rooms_by_dataset, strict=True):
        usable = rooms.usable
        found.append(
            Summary(
                dataset.entry.name,
                len(rooms),
                int((~usable).sum()),
                _spread(rooms.tokens[usable]),
                _spread(rooms.vision_tokens[usable]),
                _spread(rooms.patches[usable]),
                _kept_share(dataset.index, corpus.settings, rooms),
                rooms.shrunk,
                rooms.cut,
            )
        )
    return found


def epoch_fill(corpus: Corpus, seed: int = 0) -> tuple[int, int, Fill]:
    """Samples and rows of the first epoch, and how full the rows are."""
    rows = corpus.epoch_rows(seed, 0)
    return len(rows.samples), len(rows), fill_of(rows, corpus.rooms, corpus.settings.shape)


def suggest_budgets(corpus: Corpus, patches: Sequence[int] = _PATCHES) -> list[Budget]:
    """The same samples planned with other patch budgets, the cheapest for each sample first."""
    found = []
    for budget in patches:
        settings = with_patches(corpus.settings, budget)
        rooms = joined([rooms_of(dataset.index, settings, dataset.entry.name) for dataset in corpus.datasets])
        order = epoch_order([rooms.usable], [1.0], 0, 0)[:_LOOKED_AT]
        rows = plan_rows(rooms, order, settings.shape, (0, 0))
        row_tflop = settings.shape.length * _DECODER_TFLOP + budget * _TOWER_TFLOP
        tflop = len(rows) * row_tflop / max(len(order), 1)
        found.append(Budget(budget, len(rows), fill_of(rows, rooms, settings.shape), rooms.shrunk, tflop))
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


def _kept_share(index: Index, settings: DataSettings, rooms: Rooms) -> float | None:
    """Vision tokens left by pruning, of the samples whose videos the index counted; None if there are none."""
    left = before = 0
    for number, lengths in enumerate(index):
        if rooms.usable[number] and any(medium.kept != UNKNOWN for medium in lengths.media):
            media = tuple(dataclasses.replace(medium, kept=UNKNOWN) for medium in lengths.media)
            left += int(rooms.vision_tokens[number])
            before += room(dataclasses.replace(lengths, media=media), settings).vision_tokens
    return left / before if before else None
