"""Plans which samples share a row, from their lengths alone: equal on every host and for any number of workers.

The samples of an epoch are shuffled and go through a window. The samples of a window are assigned largest first, each
to the first open row that it fits; text-only samples go to rows whose remaining patches no image can use. A sample that
fits none opens a row of the smallest length that it fits. A row is closed once it is full, or when several windows had
nothing to fill it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from data_pipelines.packing.lengths import assign_frames
from data_pipelines.packing.sample_sizes import SampleSizes
from data_pipelines.settings import DataSettings

WINDOW = 4096  # samples; a larger window fills rows better and mixes lengths more
_MAX_AGE = 6  # windows after which a row is closed even if it is not full
_FULL = 0.985  # share of a row's tokens or patches
_TEXT_ONLY = 0.15  # rows with at most this share of their patches free are topped up with text first
_TOKENS, _VISION, _PATCHES, _SAMPLES = range(4)


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """The rows of an epoch: row r holds samples[offsets[r] : offsets[r + 1]].

    Attributes:
      offsets: [rows + 1] int64.
      samples: int64 sample numbers, row after row.
      lengths: [rows] int32, the number of tokens that each row has.
    """

    offsets: np.ndarray
    samples: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.samples[self.offsets[row] : self.offsets[row + 1]]


@dataclasses.dataclass(frozen=True)
class PackingEfficiency:
    """How full the rows of a plan are: means over rows, 0..1.

    Attributes:
      tokens: Share of the token capacity.
      patches: Share of the patch capacity.
      either: The larger of the token and the patch share of each row.
      samples: Share of the sample capacity.
    """

    tokens: float
    patches: float
    either: float
    samples: float


def epoch_order(usable: Sequence[np.ndarray], weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """Returns the samples of an epoch in random order.

    A data set of weight w contributes w times its usable samples to each epoch: the next part of an endless sequence of
    permutations of them, so that over the epochs no sample occurs twice before every other one has occurred once.

    Args:
      usable: [n] bool of each data set.
      weights: How many times the samples of each data set occur in an epoch.
      seed: Seed of the run.
      epoch: Epoch number, from 0.

    Returns:
      int64 sample numbers, counted through all data sets.
    """
    selected, first = [], 0
    for number, (mask, weight) in enumerate(zip(usable, weights, strict=True)):
        members = np.flatnonzero(mask) + first
        first += len(mask)
        start, stop = round(epoch * weight * len(members)), round((epoch + 1) * weight * len(members))
        while start < stop:
            repetition, skip = divmod(start, len(members))
            order = np.random.default_rng([seed, number, repetition]).permutation(members)
            count = min(len(members) - skip, stop - start)
            selected.append(order[skip : skip + count])
            start += count
    samples = np.concatenate([np.empty(0, np.int64), *selected])
    # 2**31 differs from the number of any data set.
    return np.random.default_rng([seed, 2**31, epoch]).permutation(samples)


def plan_packing(
    sample_sizes: SampleSizes, order: np.ndarray, settings: DataSettings, seed: Sequence[int], window: int = WINDOW
) -> PackingPlan:
    """Packs samples into rows, each as often as it occurs in `order`.

    Args:
      sample_sizes: Sizes of all samples; none exceeds the longest row.
      order: Sample numbers.
      settings: The data settings, which give the capacities of rows.
      seed: Seed of the order of the rows.
      window: Number of samples assigned at a time.
    """
    rng = np.random.default_rng(list(seed))
    all_needs = np.stack(
        [sample_sizes.tokens, sample_sizes.vision_tokens, sample_sizes.patches, np.ones_like(sample_sizes.tokens)]
    )
    packer = _Packer(settings, sample_sizes.frames, window)
    shape, rows = settings.row_shape(settings.lengths[0]), []
    # Millions of samples take minutes; for thousands the delay keeps the progress bar away.
    windows = tqdm(range(0, len(order), window), desc="pack rows", unit=" windows", delay=5.0, mininterval=1.0)
    for start in windows:
        chunk = order[start : start + window]
        needs = all_needs[:, chunk]
        fill = np.maximum(needs[_TOKENS] / shape.length, needs[_PATCHES] / (shape.patches * shape.vision_rows))
        largest_first = np.argsort(-fill, kind="stable")
        packer.assign(chunk[largest_first].tolist(), needs[:, largest_first].T.tolist())
        closed = packer.close(last=start + window >= len(order))
        rows += [closed[number] for number in rng.permutation(len(closed))]
    members = [row for row, _ in rows]
    samples = np.array([sample for row in members for sample in row], np.int64)
    lengths = np.array([length for _, length in rows], np.int32)
    return PackingPlan(np.cumsum([0, *map(len, members)], dtype=np.int64), samples, lengths)


def packing_efficiency(plan: PackingPlan, sample_sizes: SampleSizes, settings: DataSettings) -> PackingEfficiency:
    """Measures how full the rows of a plan are."""
    if not len(plan):
        return PackingEfficiency(0.0, 0.0, 0.0, 0.0)
    starts, shape = plan.offsets[:-1], settings.shape
    tokens = np.add.reduceat(sample_sizes.tokens[plan.samples].astype(np.int64), starts) / plan.lengths
    capacity = shape.patches * shape.vision_rows
    patches = np.add.reduceat(sample_sizes.patches[plan.samples].astype(np.int64), starts) / capacity
    samples = np.diff(plan.offsets) / shape.samples
    return PackingEfficiency(*(float(np.mean(x)) for x in (tokens, patches, np.maximum(tokens, patches), samples)))


class _Packer:
    """Holds the rows that are still open.

    Args:
      settings: The data settings, which give the capacities of rows.
      frames: `SampleSize.frames` of each sample, with several vision rows; else None.
      window: Number of samples assigned at a time; sizes the first buffer.
    """

    def __init__(self, settings: DataSettings, frames: list | None, window: int):
        self._shape, self._frames = settings.shape, frames
        self._patches = settings.shape.patches * settings.shape.vision_rows
        shapes = [settings.row_shape(length) for length in settings.lengths]
        self._capacities = [
            np.array([shape.length, shape.vision_tokens, self._patches, shape.samples], np.int64) for shape in shapes
        ]
        self._free = np.empty((4, 2 * window), np.int64)
        self._rows: list[list[int]] = []
        self._lengths: list[int] = []
        self._ages: list[int] = []
        self._vision_rows: list[list[int]] = []  # free patches of each vision row of each open row

    def assign(self, samples: list[int], needs: list[list[int]]) -> None:
        """Assigns each sample to an open row, or to a new one if none fits."""
        for sample, need in zip(samples, needs, strict=True):
            row = self._row_for(sample, need)
            if row is None:
                row = self._open(need)
                if self._frames is not None:
                    self._vision_rows[row] = assign_frames(self._frames[sample], self._vision_rows[row])
            self._rows[row].append(sample)
            self._free[:, row] -= need

    def close(self, last: bool) -> list[tuple[list[int], int]]:
        """Removes and returns the rows that are full or `_MAX_AGE` windows old, with their lengths; all if `last`."""
        free = self._free[:, : len(self._rows)]
        done = free[_TOKENS] <= (1 - _FULL) * np.array(self._lengths, int)
        done |= free[_PATCHES] <= (1 - _FULL) * self._patches
        done |= free[_SAMPLES] == 0
        done |= np.array(self._ages, int) >= _MAX_AGE
        done |= last
        closed = [(self._rows[row], self._lengths[row]) for row in np.flatnonzero(done)]
        keep = np.flatnonzero(~done)
        self._free[:, : len(keep)] = self._free[:, keep]
        self._rows = [self._rows[row] for row in keep]
        self._lengths = [self._lengths[row] for row in keep]
        self._ages = [self._ages[row] + 1 for row in keep]
        self._vision_rows = [self._vision_rows[row] for row in keep]
        return closed

    def _open(self, need: list[int]) -> int:
        """Opens a row of the smallest length that fits a sample."""
        capacity = next((c for c in self._capacities if np.all(need <= c)), self._capacities[-1])
        row = len(self._rows)
        if row == self._free.shape[1]:
            self._free = np.concatenate([self._free, np.empty_like(self._free)], axis=1)
        self._free[:, row] = capacity
        self._rows.append([])
        self._lengths.append(int(capacity[_TOKENS]))
        self._ages.append(0)
        self._vision_rows.append([self._shape.patches] * self._shape.vision_rows)
        return row

    def _row_for(self, sample: int, need: list[int]) -> int | None:
        """Returns the first row that the sample fits; for a text-only sample the row that most needs text."""
        free = self._free[:, : len(self._rows)]
        fits = free[_TOKENS] >= need[_TOKENS]
        fits &= free[_SAMPLES] >= 1
        if need[_PATCHES]:
            fits &= free[_PATCHES] >= need[_PATCHES]
            fits &= free[_VISION] >= need[_VISION]
        if not fits.any():
            return None
        if not need[_PATCHES]:
            # Text tops up rows whose last free patches no image was small enough for, the emptiest of them first.
            # Rows with more free patches may still get images, and come last.
            left = free[_PATCHES]
            priority = np.where(left <= _TEXT_ONLY * self._patches, left, -1 - left)
            return int(np.where(fits, priority, np.iinfo(np.int64).min).argmax())
        if self._frames is None:
            return int(fits.argmax())
        for row in np.flatnonzero(fits).tolist():
            left = assign_frames(self._frames[sample], self._vision_rows[row])
            if left is not None:
                self._vision_rows[row] = left
                return row
        return None
