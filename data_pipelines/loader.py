"""Loads packed batches in order, built by threads or worker processes, starting from any step.

    loader = Loader(mixture, rows_per_step=8)
    for batch in loader:
        train(batch.arrays)
        save(batch.state)              # {"step": 7, "plan": "..."}
    loader = Loader(mixture, rows_per_step=8, state=state, workers=4)   # resumes after that batch

The content of a step depends only on the mixture, the rows per step and the seed, not on the number of hosts, workers
or threads, nor on the step at which a run was resumed. A sample that cannot be read is counted, and its segment of the
row is left empty, with zero loss weight.
"""

import contextlib
import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import worker_processes
from data_pipelines.mixture_dataset import MixtureDataset
from data_pipelines.packing.step_plan import StepPlan
from data_pipelines.sample_builder import placeholder_sample
from data_pipelines.sample_errors import SampleError, SampleErrorLog, from_json_lines, to_json_lines
from vl3_jax.errors import InputError, RunError
from vl3_jax.processing.packed_batch import Sample, pack

BAD_SHARE = 0.05
_MIN_SAMPLES = 200  # samples seen before the share of bad ones is checked; a few at the start may be chance
_CHECK_EVERY = 20  # steps between checks of the counts summed over all hosts


class DataWorkerError(RunError):
    """A worker process ended unexpectedly."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """The rows of one step, or this host's part of them.

    Attributes:
      step: Step number, from 0.
      epoch: Epoch number, from 0.
      arrays: The packed batch.
      samples: [B, S] int64, the sample number of each segment, -1 for none.
      state: The data state after this batch, from which a loader resumes; JSON.
    """

    step: int
    epoch: int
    arrays: Mapping[str, Any]
    samples: np.ndarray
    state: dict[str, Any]


class BatchBuilder:
    """Builds the packed batch of a step. Runs in threads and worker processes.

    Args:
      mixture: The data.
      step_plan: Assigns rows to steps.
      rows: The rows of each step that are built on this host, by number; None for all.
    """

    def __init__(self, mixture: MixtureDataset, step_plan: StepPlan, rows: Sequence[int] | None):
        self._mixture, self._step_plan = mixture, step_plan
        self._rows = range(step_plan.rows_per_step) if rows is None else rows

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """Returns the arrays of this host's rows; names that start with "_" hold what only the loader uses."""
        step_rows = self._step_plan[step]
        shape = self._mixture.settings.row_shape(step_rows.length)
        numbers = np.full((len(self._rows), shape.samples), -1, np.int64)
        rows: list[list[Sample]] = [[] for _ in self._rows]
        errors: list[SampleError] = []
        for row, number in enumerate(self._rows):
            members = step_rows.rows[number] if number < len(step_rows.rows) else np.empty(0, np.int64)
            numbers[row, : len(members)] = members
            rows[row] = [self._sample(number, step_rows.epoch, errors) for number in members.tolist()]
        lines = np.frombuffer(to_json_lines(errors).encode(), np.uint8)
        return {**pack(rows, shape), "_samples": numbers, "_errors": lines}

    def _sample(self, number: int, epoch: int, errors: list[SampleError]) -> Sample:
        sample = self._mixture.sample(number, (self._step_plan.seed, epoch))
        if isinstance(sample, Sample):
            return sample
        errors.append(sample)
        return placeholder_sample(self._mixture.sample_size(number), self._mixture.settings.shape.vision_rows)


class Loader(contextlib.AbstractContextManager, Iterator[Batch]):
    """Iterates over the remaining batches of a run.

    Args:
      mixture: The data.
      rows_per_step: Rows of a step on all hosts together.
      epochs: Number of passes over the data.
      seed: Seed of the sample order and of the row order.
      rows: The rows of each step that this host builds, by number; None for all.
      workers: Number of worker processes; 0 builds batches in threads of this process.
      threads: Number of concurrent threads, shared by the workers; the number of processors by default.
      state: State of the batch after which to resume; None starts at step 0.
      bad_share: The run stops if more than this share of the samples is bad, 0..1.
      reduce_counts: Sums the array [bad, seen] over all hosts; every host calls it at the same steps.

    Raises:
      InputError: The state belongs to other data, or there is nothing to read.
      TooManyBadSamplesError: Too many samples are bad; raised here if the index already says so, otherwise from
        iteration.
      DataWorkerError: A worker process died; raised from iteration.
    """

    def __init__(
        self,
        mixture: MixtureDataset,
        rows_per_step: int,
        *,
        epochs: int = 1,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        workers: int = 0,
        threads: int | None = None,
        state: Mapping[str, Any] | None = None,
        bad_share: float = BAD_SHARE,
        reduce_counts: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        mixture.log().check(bad_share, 1)
        self.log = SampleErrorLog()
        self.step_plan = mixture.step_plan(rows_per_step, epochs, seed)
        self._build_batch = BatchBuilder(mixture, self.step_plan, rows)
        self._workers, self._threads = workers, threads or os.cpu_count() or 1
        self._bad_share, self._reduce_counts = bad_share, reduce_counts
        if state is not None and state.get("plan") != self.step_plan.identity:
            raise InputError(
                f"the data state of step {state.get('step')} was saved with other data, weights, settings, seed or "
                "rows per step; restore those, or start a new run"
            )
        self._next_step = 0 if state is None else int(state["step"])
        self._iterator: Iterator | None = None
        self._opened = contextlib.ExitStack()

    def __len__(self) -> int:
        """Returns the number of steps of the whole run, including those before the resumed state."""
        return len(self.step_plan)

    def __next__(self) -> Batch:
        if self._next_step >= len(self.step_plan):
            self.close()
            raise StopIteration
        if self._iterator is None:
            steps = range(self._next_step, len(self))
            function = self._opened.enter_context(worker_processes.stored(self._build_batch))
            build_batch = function if self._workers else self._build_batch
            self._iterator = _pipeline(build_batch, steps, self._workers, self._threads)
            with worker_processes.without_terminal_signals():  # starts the workers
                arrays = self._next_arrays()
        else:
            arrays = self._next_arrays()
        samples, lines = arrays.pop("_samples"), arrays.pop("_errors")
        self.log.add(from_json_lines(lines.tobytes().decode()), int((samples >= 0).sum()))
        step, self._next_step = self._next_step, self._next_step + 1
        self._stop_if_bad()
        state = {"step": self._next_step, "plan": self.step_plan.identity}
        return Batch(step, self.step_plan[step].epoch, arrays, samples, state)

    def close(self) -> None:
        """Stops threads and workers; iteration may still be continued afterwards, which starts new ones."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
        self._opened.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next_arrays(self) -> dict[str, np.ndarray]:
        try:
            return dict(next(self._iterator))
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            for worker in multiprocessing.active_children():  # closing would wait until they have started
                if worker.name.startswith("grain-"):
                    worker.kill()
            raise DataWorkerError(
                f"a data worker died at step {self._next_step} ({error}): killed, perhaps out of memory; "
                "resume from the last checkpoint, with fewer workers if needed"
            ) from error

    def _stop_if_bad(self) -> None:
        if self._reduce_counts is None:
            self.log.check(self._bad_share, _MIN_SAMPLES)
        elif self._next_step % _CHECK_EVERY == 0 or self._next_step == len(self):
            bad, seen = self._reduce_counts(np.array([self.log.bad, self.log.seen], np.int64)).tolist()
            self.log.check(self._bad_share, _MIN_SAMPLES, bad, seen)


def _pipeline(build_batch: Callable, steps: range, workers: int, threads: int) -> Iterator[dict[str, np.ndarray]]:
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, which only programs of absl.app have parsed
    threads = max(1, threads // max(workers, 1))  # of each process
    # Grain's default buffer of 500 elements would be 500 batches.
    read_options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads if workers else max(2, threads))
    batches = grain.MapDataset.range(steps.start, steps.stop).map(build_batch).to_iter_dataset(read_options)
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        batches = batches.mp_prefetch(options, worker_init_fn=_init_worker)
    return iter(batches)


def _init_worker(_number: int, _count: int) -> None:
    worker_processes.end_with_parent()
