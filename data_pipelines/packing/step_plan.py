"""Assigns the packed rows of each epoch to the steps of a training run: equal on every host.

The rows of a step have the same length, so that a step is one of a few compiled programs. The rows of each length keep
their order, and a step takes the place of its last row.
"""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.packing.packing_plan import PackingPlan
from vl3_jax.errors import InputError

NO_SAMPLE = "the data has no usable sample, or too small a weight; `vl3 data check` lists what is wrong with each"


@dataclasses.dataclass(frozen=True)
class StepRows:
    """The rows of one step.

    Attributes:
      epoch: Epoch number, from 0.
      length: Number of tokens of each row.
      rows: Sample numbers of each row; the last step of an epoch may have fewer rows than the others.
    """

    epoch: int
    length: int
    rows: list[np.ndarray]


class StepPlan:
    """The rows of every step.

    Args:
      epochs: The packing plans of the first epochs.
      rows_per_step: Rows of a step on all hosts together.
      seed: Seed of the random choices within samples.
      identity: A fingerprint of everything that the content of the steps depends on.
      count: Number of epochs of the run; after the planned ones, their plans begin anew. By default those planned.

    Raises:
      InputError: No usable sample.
    """

    def __init__(
        self, epochs: Sequence[PackingPlan], rows_per_step: int, seed: int, identity: str, count: int | None = None
    ):
        self.epochs, self.rows_per_step, self.seed, self.identity = epochs, rows_per_step, seed, identity
        self._steps = [_steps(plan.lengths, rows_per_step) for plan in epochs]  # rows of each step; -1 = none
        self._firsts = np.cumsum([0, *map(len, self._steps)]).tolist()
        rounds, rest = divmod(len(epochs) if count is None else count, len(epochs))
        self._count = rounds * self._firsts[-1] + self._firsts[rest]
        if not self._count:
            raise InputError(NO_SAMPLE)

    def __len__(self) -> int:
        """Returns the number of steps of all epochs."""
        return self._count

    def __getitem__(self, step: int) -> StepRows:
        rounds, step = divmod(step, self._firsts[-1])
        epoch = bisect.bisect_right(self._firsts, step) - 1
        plan, rows = self.epochs[epoch], self._steps[epoch][step - self._firsts[epoch]]
        rows = rows[rows >= 0]
        number = rounds * len(self.epochs) + epoch
        return StepRows(number, int(plan.lengths[rows].max()), [plan[row] for row in rows])

    @property
    def lengths(self) -> list[int]:
        """The lengths of rows that steps have, ascending."""
        found: set[int] = set()
        for plan, steps in zip(self.epochs, self._steps, strict=True):
            found.update(np.where(steps < 0, 0, plan.lengths[steps]).max(axis=1).tolist())
        return sorted(found)


def _steps(lengths: np.ndarray, rows_per_step: int) -> np.ndarray:
    """Returns the rows of each step, [steps, rows_per_step] int64; -1 fills the last step.

    The last rows of a length that are too few for a step are joined by rows of the next smaller length.
    """
    steps, left = np.empty((0, rows_per_step), np.int64), np.empty(0, np.int64)
    for length in np.unique(lengths)[::-1]:
        rows = np.flatnonzero(lengths == length)
        if len(left):
            missing = min(rows_per_step - len(left), len(rows))
            rows = np.concatenate([left, rows[len(rows) - missing :], rows[: len(rows) - missing]])
        whole = len(rows) // rows_per_step * rows_per_step
        steps, left = np.concatenate([steps, rows[:whole].reshape(-1, rows_per_step)]), rows[whole:]
    steps = steps[np.argsort(steps.max(axis=1), kind="stable")]
    last = np.pad(left, (0, -len(left) % rows_per_step), constant_values=-1)
    return np.concatenate([steps, last.reshape(-1, rows_per_step)])
