"""Packed batches in order, assembled by threads or worker processes, from any step on.

    loader = Loader(corpus, rows_per_step=8)
    for batch in loader:
        train(batch.arrays)
        save(batch.state)              # {"step": 7, "plan": "..."}
    loader = Loader(corpus, rows_per_step=8, state=state, workers=4)   # goes on after that batch

The content of a step depends on nothing but the corpus, the rows of a step and the seed: not on hosts, workers, threads
or where a run began. What fails to be read leaves its place in the row empty, without weight, and is counted.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from data_pipelines.mixture_dataset import MixtureDataset
from data_pipelines.sample_builder import placeholder_sample
from data_pipelines.sample_errors import SampleError, SampleErrorLog, from_json, to_json
from data_pipelines.step_plan import StepPlan
from vl3_jax.errors import InputError
from vl3_jax.processing.packed_batch import Sample, pack

BAD_SHARE = 0.05
_DECIDE_FROM = 200  # samples; before, a few bad ones may come together by chance
_CHECK_EVERY = 20  # steps between the hosts' agreements


class DataWorkerError(RuntimeError):
    """A worker process ended by itself."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step, or a host's part of it.

    Attributes:
      step: from 0.
      epoch: from 0.
      arrays: the packed batch.
      samples: [B, S] int64, the sample number in each segment's place, -1 for none.
      state: to go on after this batch; JSON.
    """

    step: int
    epoch: int
    arrays: Mapping[str, Any]
    samples: np.ndarray
    state: dict[str, Any]


class BatchBuilder:
    """Step number -> arrays. Runs in threads and worker processes."""

    def __init__(self, mixture: MixtureDataset, schedule: StepPlan, rows: slice):
        self._corpus, self._schedule, self._rows = mixture, schedule, rows

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """The arrays of this host's rows, and under "_" names what the loader itself needs."""
        planned = self._schedule[step]
        shape = self._corpus.settings.shape
        wanted = range(*self._rows.indices(self._schedule.rows_per_step))
        numbers = np.full((len(wanted), shape.samples), -1, np.int64)
        rows: list[list[Sample]] = []
        problems: list[SampleError] = []
        for place, row in enumerate(wanted):
            members = planned.rows[row].tolist() if row < len(planned.rows) else []
            numbers[place, : len(members)] = members
            rows.append([self._sample(number, planned.epoch, problems) for number in members])
        lines = "".join(to_json(problem) + "\n" for problem in problems).encode()
        return {**pack(rows, shape), "_samples": numbers, "_problems": np.frombuffer(lines, np.uint8)}

    def _sample(self, number: int, epoch: int, problems: list[SampleError]) -> Sample:
        found = self._corpus.sample(number, (self._schedule.seed, epoch))
        if isinstance(found, Sample):
            return found
        problems.append(found)
        return placeholder_sample(self._corpus.room(number), self._corpus.settings.shape.vision_rows)


class Loader:
    """Iterates over the batches that are left.

    Args:
      corpus: the data.
      rows_per_step: on all hosts together.
      epochs: how often the data is gone through.
      seed: of order and rows.
      rows: those of a step that this host assembles; all if not given.
      workers: processes; 0 assembles in threads of this one.
      threads: at work at a time (in each worker); as many as processors if not given.
      state: of the batch to go on after; None begins.
      bad_share: more bad samples than this share stop the run.
      log: where problems are counted; a new one if not given.
      agree: adds up [bad, seen] over all hosts; called by every host at the same steps.

    Raises:
      InputError: the state belongs to other data; nothing to read.
      TooManyBadSamplesError: at once if the index knows of too many, later from iteration.
      DataWorkerError: from iteration.
    """

    def __init__(
        self,
        mixture: MixtureDataset,
        rows_per_step: int,
        *,
        epochs: int = 1,
        seed: int = 0,
        rows: slice = slice(None),
        workers: int = 0,
        threads: int | None = None,
        state: Mapping[str, Any] | None = None,
        bad_share: float = BAD_SHARE,
        log: SampleErrorLog | None = None,
        reduce_counts: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        mixture.log().check(bad_share, 1)
        self.log = SampleErrorLog() if log is None else log
        self.schedule = StepPlan(mixture, rows_per_step, epochs, seed)
        self._assemble = BatchBuilder(mixture, self.schedule, rows)
        self._workers, self._threads = workers, threads or os.cpu_count() or 1
        self._bad_share, self._agree = bad_share, reduce_counts
        self._next = self._step_after(state)
        self._iterator: Iterator | None = None

    def __len__(self) -> int:
        """Steps of the whole run, done ones included."""
        return len(self.schedule)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self._next >= len(self.schedule):
            self.close()
            raise StopIteration
        if self._iterator is None:
            self._iterator = _pipeline(self._assemble, range(self._next, len(self)), self._workers, self._threads)
        element = self._element()
        samples, lines = element.pop("_samples"), element.pop("_problems")
        problems = [from_json(line) for line in lines.tobytes().decode().splitlines()]
        self.log.add(problems, int((samples >= 0).sum()))
        step, self._next = self._next, self._next + 1
        self._stop_if_bad()
        return Batch(step, self.schedule[step].epoch, element, samples, self._state(step + 1))

    def close(self) -> None:
        """Ends threads and workers; the loader may be asked for further batches all the same."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _element(self) -> dict[str, np.ndarray]:
        try:
            return dict(next(self._iterator))
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise DataWorkerError(
                f"a data worker died at step {self._next} ({error}): killed, perhaps for want of memory; "
                "go on from the last checkpoint, with fewer workers if need be"
            ) from error

    def _stop_if_bad(self) -> None:
        if self._agree is None:
            self.log.check(self._bad_share, _DECIDE_FROM)
        elif self._next % _CHECK_EVERY == 0 or self._next == len(self):
            bad, seen = self._agree(np.array([self.log.bad, self.log.seen], np.int64)).tolist()
            self.log.check(self._bad_share, _DECIDE_FROM, bad, seen)

    def _state(self, step: int) -> dict[str, Any]:
        return {"step": step, "plan": self.schedule.identity}

    def _step_after(self, state: Mapping[str, Any] | None) -> int:
        if state is None:
            return 0
        if state.get("plan") != self.schedule.identity:
            raise InputError(
                f"the data state of step {state.get('step')} was saved with other data, weights, settings, seed or "
                "rows a step; restore those, or start the data anew"
            )
        return int(state["step"])


def _pipeline(assemble: Callable, steps: range, workers: int, threads: int) -> Iterator[dict[str, np.ndarray]]:
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # its workers ask for flags, which only programs of absl.app have parsed
    dataset = grain.MapDataset.range(steps.start, steps.stop).map(assemble)
    # Its own buffer of 500 elements would be 500 batches.
    within = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2, threads))
    if not workers:
        return iter(dataset.to_iter_dataset(within))
    each = max(1, threads // workers)
    within = grain.ReadOptions(num_threads=each, prefetch_buffer_size=each)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
    return iter(dataset.to_iter_dataset(within).mp_prefetch(options))
