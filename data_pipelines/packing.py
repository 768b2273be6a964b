"""Which samples share a row: planned from lengths alone, the same on every host and for any number of workers.

An epoch's samples are shuffled and go through a window. Those in the window are placed largest first, each into the
first open row with room for it, text alone into rows that pictures cannot fill. A row is closed once it is full, or
when several windows brought nothing to fill it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from data_pipelines.lengths import assign_frames
from data_pipelines.sample_sizes import SampleSizes
from vl3_jax.processing.packed_batch import BatchShape

WINDOW = 4096  # samples; a larger one fills rows better and mixes lengths more
_PATIENCE = 6  # windows that a row may wait for what fills it
_FULL = 0.985
_TOP_UP = 0.15  # share of a row's patches
_TOKENS, _VISION, _PATCHES, _SAMPLES = range(4)


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """The rows of an epoch: row r holds samples[offsets[r] : offsets[r + 1]]."""

    offsets: np.ndarray
    samples: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.samples[self.offsets[row] : self.offsets[row + 1]]


@dataclasses.dataclass(frozen=True)
class PackingEfficiency:
    """Mean over rows of how full they are, 0..1; `either` is the larger of token and patch fill of each row."""

    tokens: float
    patches: float
    max_fill: float
    samples: float


def epoch_order(usable: Sequence[np.ndarray], weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """The samples of an epoch in random order.

    A data set of weight w gives w times its usable samples to each epoch: of its endless sequence of permutations the
    next stretch, so that over the epochs none is seen twice before all others were seen once.

    Args:
      usable: [n] bool of each data set.
      weights: how many times its samples are seen in an epoch.
      seed: of the run.
      epoch: from 0.

    Returns:
      int64 numbers of samples, counted through all data sets.
    """
    drawn, first = [], 0
    for number, (good, weight) in enumerate(zip(usable, weights, strict=True)):
        members = np.flatnonzero(good) + first
        first += len(good)
        start, stop = round(epoch * weight * len(members)), round((epoch + 1) * weight * len(members))
        while start < stop:
            turn, skip = divmod(start, len(members))
            order = np.random.default_rng([seed, number, turn]).permutation(members)
            take = min(len(members) - skip, stop - start)
            drawn.append(order[skip : skip + take])
            start += take
    together = np.concatenate([np.empty(0, np.int64), *drawn])
    # A data set's number is never this large.
    return np.random.default_rng([seed, 2**31, epoch]).permutation(together)


def plan_packing(
    sample_sizes: SampleSizes, order: np.ndarray, shape: BatchShape, seed: Sequence[int], window: int = WINDOW
) -> PackingPlan:
    """Packs samples, all of them, each once for each time it occurs in `order`.

    Args:
      rooms: what each sample takes; none more than `shape` has.
      order: numbers of samples.
      shape: capacities of a row.
      seed: of the order of the rows.
      window: samples placed at a time.
    """
    rng = np.random.default_rng(list(seed))
    needs = np.stack(
        [sample_sizes.tokens, sample_sizes.vision_tokens, sample_sizes.patches, np.ones_like(sample_sizes.tokens)]
    )
    packer = _Packer(shape, sample_sizes.frames, window)
    rows: list[list[int]] = []
    # Millions of samples take minutes; thousands are done before a bar would show.
    windows = tqdm(range(0, len(order), window), desc="plan rows", unit=" windows", delay=5.0, mininterval=1.0)
    for start in windows:
        chunk = order[start : start + window]
        needed = needs[:, chunk]
        size = np.maximum(needed[_TOKENS] / shape.length, needed[_PATCHES] / (shape.patches * shape.vision_rows))
        largest = np.argsort(-size, kind="stable")
        packer.place(chunk[largest].tolist(), needed[:, largest].T.tolist())
        closed = packer.close(last=start + window >= len(order))
        rows += [closed[number] for number in rng.permutation(len(closed))]
    counts = np.array([len(row) for row in rows], np.int64)
    samples = np.array([sample for row in rows for sample in row], np.int64)
    return PackingPlan(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), samples)


def packing_efficiency(rows: PackingPlan, sample_sizes: SampleSizes, shape: BatchShape) -> PackingEfficiency:
    """How full planned rows are."""
    if not len(rows):
        return PackingEfficiency(0.0, 0.0, 0.0, 0.0)
    starts = rows.offsets[:-1]
    tokens = np.add.reduceat(sample_sizes.tokens[rows.samples].astype(np.int64), starts) / shape.length
    capacity = shape.patches * shape.vision_rows
    patches = np.add.reduceat(sample_sizes.patches[rows.samples].astype(np.int64), starts) / capacity
    samples = np.diff(rows.offsets) / shape.samples
    return PackingEfficiency(*(float(np.mean(x)) for x in (tokens, patches, np.maximum(tokens, patches), samples)))


class _Packer:
    """The open rows."""

    def __init__(self, shape: BatchShape, frames: list | None, window: int):
        self._shape, self._frames = shape, frames
        self._whole = np.array(
            [shape.length, shape.vision_tokens, shape.patches * shape.vision_rows, shape.samples], np.int64
        )
        self._free = np.empty((4, 2 * window), np.int64)
        self._rows: list[list[int]] = []
        self._ages: list[int] = []
        self._vision_rows: list[list[int]] = []  # patches free in each, with several

    def place(self, samples: list[int], needs: list[list[int]]) -> None:
        """Each sample into an open row, or a new one."""
        for sample, need in zip(samples, needs, strict=True):
            row = self._row_for(sample, need)
            if row is None:
                row = self._open()
                if self._frames is not None:
                    self._vision_rows[row] = assign_frames(self._frames[sample], self._vision_rows[row])
            self._rows[row].append(sample)
            self._free[:, row] -= need

    def close(self, last: bool) -> list[list[int]]:
        """Takes out the rows that are full or have waited long; all at the end."""
        count = len(self._rows)
        used = 1 - self._free[:, :count] / self._whole[:, None]
        done = np.maximum(used[_TOKENS], used[_PATCHES]) >= _FULL
        done |= self._free[_SAMPLES, :count] == 0
        done |= np.array(self._ages, int) >= _PATIENCE
        if last:
            done[:] = True
        closed = [row for row, is_done in zip(self._rows, done, strict=True) if is_done]
        keep = np.flatnonzero(~done)
        self._free[:, : len(keep)] = self._free[:, keep]
        self._rows = [self._rows[row] for row in keep]
        self._ages = [self._ages[row] + 1 for row in keep]
        self._vision_rows = [self._vision_rows[row] for row in keep]
        return closed

    def _open(self) -> int:
        row = len(self._rows)
        if row == self._free.shape[1]:
            self._free = np.concatenate([self._free, np.empty_like(self._free)], axis=1)
        self._free[:, row] = self._whole
        self._rows.append([])
        self._ages.append(0)
        self._vision_rows.append([self._shape.patches] * self._shape.vision_rows)
        return row

    def _row_for(self, sample: int, need: list[int]) -> int | None:
        """The first row with room; for text alone, the one that most needs it."""
        free = self._free[:, : len(self._rows)]
        takes = free[_TOKENS] >= need[_TOKENS]
        takes &= free[_SAMPLES] >= 1
        if need[_PATCHES]:
            takes &= free[_PATCHES] >= need[_PATCHES]
            takes &= free[_VISION] >= need[_VISION]
        if not takes.any():
            return None
        if not need[_PATCHES]:
            # Text tops up rows whose last patches no picture was small enough for, the emptiest of them first.
            # Rows with more left than that still wait for pictures, and come last.
            left = free[_PATCHES]
            wish = np.where(left <= _TOP_UP * self._whole[_PATCHES], left, -1 - left)
            return int(np.where(takes, wish, np.iinfo(np.int64).min).argmax())
        if self._frames is None:
            return int(takes.argmax())
        for row in np.flatnonzero(takes).tolist():
            left = assign_frames(self._frames[sample], self._vision_rows[row])
            if left is not None:
                self._vision_rows[row] = left
                return row
        return None
