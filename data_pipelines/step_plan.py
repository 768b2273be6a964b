"""Which rows make up each step of a training run: the same on every host."""

import dataclasses

import numpy as np

from data_pipelines.mixture_dataset import MixtureDataset
from data_pipelines.settings import fingerprint
from vl3_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class StepRows:
    """One step: rows of sample numbers, fewer than the others at the end of an epoch."""

    number: int
    epoch: int
    rows: list[np.ndarray]


class StepPlan:
    """Step s of epoch e uses rows [s * G, (s + 1) * G) of the epoch's plan; the last step of an epoch may lack some.

    Args:
      corpus: of the run.
      rows_per_step: G, on all hosts together.
      epochs: how many; all are planned at once.
      seed: of order and rows.
    """

    def __init__(self, mixture: MixtureDataset, rows_per_step: int, epochs: int = 1, seed: int = 0):
        if rows_per_step < 1 or epochs < 1:
            raise InputError(f"{rows_per_step} rows a step and {epochs} epochs; give at least 1 of each")
        self.rows_per_step, self.seed = rows_per_step, seed
        self.epochs = [mixture.epoch_plan(seed, epoch) for epoch in range(epochs)]
        self._ends = np.cumsum([-(-len(rows) // rows_per_step) for rows in self.epochs])
        if not self._ends[-1]:
            raise InputError("not one usable sample in the data; `vl3 data check` lists what is wrong with them")
        self.identity = fingerprint([mixture.identity(), rows_per_step, seed])

    def __len__(self) -> int:
        """Steps of all epochs."""
        return int(self._ends[-1])

    def __getitem__(self, step: int) -> StepRows:
        epoch = int(np.searchsorted(self._ends, step, side="right"))
        first = (step - (int(self._ends[epoch - 1]) if epoch else 0)) * self.rows_per_step
        rows = self.epochs[epoch]
        return StepRows(step, epoch, [rows[row] for row in range(first, min(first + self.rows_per_step, len(rows)))])
