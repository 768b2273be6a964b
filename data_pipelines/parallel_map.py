"""Applies a function to ranges of a data set, in this process or in several worker processes."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Result = TypeVar("Result")
_worker_call: tuple[Callable, tuple] | None = None  # function and shared arguments, set in each worker process


class WorkerDiedError(RuntimeError):
    """A worker process ended unexpectedly, most often because it was killed for lack of memory."""


def parallel_map(
    function: Callable[..., Result],
    shared: tuple,
    ranges: Sequence[tuple],
    total: int,
    workers: int,
    on_progress: Callable[[int, int], None],
) -> list[Result]:
    """Calls `function(*shared, start, stop, ...)` for each range of samples.

    Args:
      function: A module-level function, so that it can be pickled.
      shared: Arguments common to all calls; sent to each worker once.
      ranges: The remaining arguments of each call; the first two are the range [start, stop).
      total: Number of samples; those outside the ranges count as done.
      workers: Number of worker processes; 0 works in this process.
      on_progress: Called before the first and after each range with the number of samples done and the total.

    Returns:
      The results in order of the ranges.

    Raises:
      WorkerDiedError: A worker process died.
    """
    sizes = [stop - start for start, stop, *_ in ranges]
    done, results = total - sum(sizes), {}
    on_progress(done, total)
    if workers <= 0 or len(ranges) <= 1:
        completed = ((number, function(*shared, *arguments)) for number, arguments in enumerate(ranges))
    else:
        completed = _map_in_workers(function, shared, ranges, workers)
    try:
        for number, result in completed:
            results[number] = result
            done += sizes[number]
            on_progress(done, total)
    finally:
        completed.close()
    return [results[number] for number in range(len(ranges))]


def chunk_ranges(total: int, size: int) -> list[tuple[int, int]]:
    """Splits [0, total) into consecutive ranges (start, stop) of at most `size`."""
    return [(start, min(start + size, total)) for start in range(0, total, size)]


def _map_in_workers(
    function: Callable[..., Result], shared: tuple, ranges: Sequence[tuple], workers: int
) -> Iterator[tuple[int, Result]]:
    """Yields the number of each range and its result, in order of completion."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _init_worker, (function, shared))
    pending, running = enumerate(ranges), {}
    try:
        while True:
            for number, arguments in pending:
                running[pool.submit(_call, arguments)] = number
                if len(running) >= 2 * workers:
                    break
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        raise WorkerDiedError(
            "a worker process died (killed, perhaps out of memory); run the command again, with fewer workers if "
            "needed: indexing and writing resume where they stopped"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _init_worker(function: Callable, shared: tuple) -> None:
    global _worker_call
    _worker_call = function, shared


def _call(arguments: tuple) -> Any:
    function, shared = _worker_call
    return function(*shared, *arguments)
