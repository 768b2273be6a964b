"""Applies a function to ranges of a data set, in this process or in several worker processes."""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from data_pipelines import worker_processes
from vl3_jax.errors import RunError

Result = TypeVar("Result")
_function: Callable | None = None  # set in each worker process


class WorkerDiedError(RunError):
    """A worker process ended unexpectedly, most often because it was killed for lack of memory."""


def parallel_map(
    function: Callable[..., Result],
    ranges: Sequence[tuple],
    total: int,
    workers: int,
    on_progress: Callable[[int, int], None],
) -> list[Result]:
    """Calls `function(start, stop, ...)` for each range of samples.

    Args:
      function: A function that can be pickled, such as a `functools.partial` of one of a module; it is sent to each
        worker once.
      ranges: The arguments of each call; the first two are the range [start, stop).
      total: Number of samples; those outside the ranges count as done.
      workers: Number of worker processes; 0 works in this process.
      on_progress: Called before the first and after each range with the number of samples done and the total.

    Returns:
      The results in order of the ranges.

    Raises:
      WorkerDiedError: A worker process died.
    """
    sizes = [stop - start for start, stop, *_ in ranges]
    done, results = total - sum(sizes), []
    on_progress(done, total)
    in_workers = workers > 0 and len(ranges) > 1
    computed = _map_in_workers(function, ranges, workers) if in_workers else (function(*range_) for range_ in ranges)
    with contextlib.closing(computed):
        for size, result in zip(sizes, computed, strict=True):
            results.append(result)
            done += size
            on_progress(done, total)
    return results


def chunk_ranges(total: int, size: int) -> list[tuple[int, int]]:
    """Splits [0, total) into consecutive ranges (start, stop) of at most `size`."""
    return [(start, min(start + size, total)) for start in range(0, total, size)]


def _map_in_workers(function: Callable[..., Result], ranges: Sequence[tuple], workers: int) -> Iterator[Result]:
    with worker_processes.stored(function) as stored:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _init_worker, (stored,))
        try:
            with worker_processes.without_terminal_signals():
                results = pool.map(_call, ranges)  # starts all workers
            yield from results
        except (BrokenProcessPool, BrokenPipeError) as error:
            raise WorkerDiedError(
                "a worker process died (killed, perhaps out of memory); run the command again, with fewer workers if "
                "needed: indexing and writing resume where they stopped"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _init_worker(function: Callable) -> None:
    global _function
    worker_processes.end_with_parent()
    _function = function


def _call(arguments: tuple) -> Any:
    assert _function is not None
    return _function(*arguments)
