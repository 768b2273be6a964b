"""Work on stretches of a data set, in this process or in several."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Result = TypeVar("Result")
_given: tuple[Callable, tuple] | None = None  # of a worker process


class WorkerDiedError(RuntimeError):
    """A worker process ended by itself: killed from outside, most often for want of memory."""


def parallel_map(
    function: Callable[..., Result], given: tuple, spans: Sequence[tuple], workers: int
) -> Iterator[tuple[tuple, Result]]:
    """Calls `function(*given, *span)` for each span.

    Args:
      function: of a module, so that workers find it.
      given: the same for all; sent to each worker once.
      spans: what differs.
      workers: processes; 0 works in this one.

    Yields:
      Each span with its result, in order of completion.

    Raises:
      WorkerDiedError: see there.
    """
    if workers <= 0 or len(spans) <= 1:
        for span in spans:
            yield span, function(*given, *span)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (function, given))
    left, running = iter(spans), {}
    try:
        while True:
            for span in left:
                running[pool.submit(_work, span)] = span
                if len(running) >= 2 * workers:
                    break
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        raise WorkerDiedError(
            "a worker process died (killed, perhaps for want of memory); run the command again, with fewer workers if "
            "need be: indexing and writing go on where they stopped"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def chunk_ranges(total: int, size: int) -> list[tuple[int, int]]:
    """[0, total) in stretches of `size`."""
    return [(start, min(start + size, total)) for start in range(0, total, size)]


def _start(function: Callable, given: tuple) -> None:
    global _given
    _given = function, given


def _work(span: tuple) -> Any:
    function, given = _given
    return function(*given, *span)
