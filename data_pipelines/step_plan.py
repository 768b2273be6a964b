"""Assigns the packed rows of each epoch to the steps of a training run: equal on every host."""

import dataclasses

import numpy as np

from data_pipelines.mixture_dataset import MixtureDataset
from data_pipelines.settings import fingerprint
from vl3_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class StepRows:
    """The rows of one step.

    Attributes:
      number: Step number, from 0.
      epoch: Epoch number, from 0.
      rows: Sample numbers of each row; the last step of an epoch may have fewer rows than the others.
    """

    number: int
    epoch: int
    rows: list[np.ndarray]


class StepPlan:
    """Step s of an epoch uses rows [s * G, (s + 1) * G) of the epoch's packing plan.

    Args:
      mixture: The data of the run.
      rows_per_step: G, the rows of a step on all hosts together.
      epochs: Number of epochs; all are planned at once.
      seed: Seed of the sample order and of the row order.

    Raises:
      InputError: No row per step, no epoch, or no usable sample.
    """

    def __init__(self, mixture: MixtureDataset, rows_per_step: int, epochs: int = 1, seed: int = 0):
        if rows_per_step < 1 or epochs < 1:
            raise InputError(f"{rows_per_step} rows per step and {epochs} epochs; give at least 1 of each")
        self.rows_per_step, self.seed = rows_per_step, seed
        self.epochs = [mixture.epoch_plan(seed, epoch) for epoch in range(epochs)]
        self._ends = np.cumsum([-(-len(plan) // rows_per_step) for plan in self.epochs])
        if not self._ends[-1]:
            raise InputError("the data has no usable sample; `vl3 data check` lists what is wrong with each")
        self.identity = fingerprint([mixture.identity(), rows_per_step, seed])

    def __len__(self) -> int:
        """Returns the number of steps of all epochs."""
        return int(self._ends[-1])

    def __getitem__(self, step: int) -> StepRows:
        epoch = int(np.searchsorted(self._ends, step, side="right"))
        first = (step - (int(self._ends[epoch - 1]) if epoch else 0)) * self.rows_per_step
        plan = self.epochs[epoch]
        return StepRows(step, epoch, [plan[row] for row in range(first, min(first + self.rows_per_step, len(plan)))])
