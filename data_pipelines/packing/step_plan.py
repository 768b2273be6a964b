"""Assigns the packed rows of each epoch to the steps of a training run: equal on every host."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.packing.packing_plan import PackingPlan
from vl3_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class StepRows:
    """The rows of one step.

    Attributes:
      epoch: Epoch number, from 0.
      rows: Sample numbers of each row; the last step of an epoch may have fewer rows than the others.
    """

    epoch: int
    rows: list[np.ndarray]


class StepPlan:
    """Step s of an epoch uses rows [s * G, (s + 1) * G) of the epoch's packing plan.

    Args:
      epochs: The packing plan of each epoch.
      rows_per_step: G, the rows of a step on all hosts together.
      seed: Seed of the random choices within samples.
      identity: A fingerprint of everything that the content of the steps depends on.

    Raises:
      InputError: No usable sample.
    """

    def __init__(self, epochs: Sequence[PackingPlan], rows_per_step: int, seed: int, identity: str):
        self.epochs, self.rows_per_step, self.seed, self.identity = epochs, rows_per_step, seed, identity
        self._firsts = np.cumsum([0, *(-(-len(plan) // rows_per_step) for plan in epochs)])
        if not len(self):
            raise InputError("the data has no usable sample; `vl3 data check` lists what is wrong with each")

    def __len__(self) -> int:
        """Returns the number of steps of all epochs."""
        return int(self._firsts[-1])

    def __getitem__(self, step: int) -> StepRows:
        epoch = int(np.searchsorted(self._firsts, step, side="right")) - 1
        first = (step - int(self._firsts[epoch])) * self.rows_per_step
        plan = self.epochs[epoch]
        return StepRows(epoch, [plan[row] for row in range(first, min(first + self.rows_per_step, len(plan)))])
