"""Runs a function over many inputs in forked workers with bounds of time and memory: the harness of fuzz tests.

Workers are forked from a small server process that has never imported jax, whatever the tests have. Each serves many
inputs; one that exceeds a bound or dies is killed and replaced, so that every input has an outcome.

    outcomes = run_bounded(read_file, paths)
    assert not [outcome for outcome in outcomes if not outcome.harmless]
"""

import contextlib
import dataclasses
import multiprocessing
import os
import resource
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from multiprocessing import connection
from typing import Any

from vl3_jax.errors import InputError

_PAGE = os.sysconf("SC_PAGE_SIZE")
_POLL_SECONDS = 0.05
_START_SECONDS = 60  # of a worker, imports included
_PRELOADED = ["support.bounded", "vl3_jax.processing.processor"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a function did with one input.

    Attributes:
      item: The input.
      kind: "result"; "refused" (it raised `InputError`); "error" (another exception); "hang" (it took too long, twice);
        "memory" (too much of it); "died" (a crash or an exit of its process).
      value: The result (of "result"); the message of the InputError, the traceback, or what happened.
      seconds: Seconds that it took.
      peak: Largest resident memory of its worker so far, in bytes.
    """

    item: Any
    kind: str
    value: Any
    seconds: float
    peak: int

    @property
    def harmless(self) -> bool:
        """Whether the input gave a result or was refused in one line."""
        return self.kind == "result" or (self.kind == "refused" and "\n" not in self.value)

    def __str__(self) -> str:
        return f"{self.item!r}: {self.kind} after {self.seconds:.1f} s, {self.peak >> 20} MB: {self.value}"


def run_bounded(
    function: Callable[[Any], Any],
    inputs: Iterable[Any],
    *,
    workers: int = 2,
    seconds: float = 5.0,
    memory: int = 2**30,
) -> list[Outcome]:
    """Calls a function with each input, in workers with bounds.

    Args:
      function: A function of a module, or a `functools.partial` of one: workers import it by name.
      inputs: Its inputs, which are pickled, as are its results.
      workers: Number of processes.
      seconds: Time for one input. An input that takes longer is tried once more, because a busy machine is slow, too.
      memory: Resident memory of a worker in bytes, what Python and its libraries take included.

    Returns:
      The outcome of each input, in the order of the inputs.
    """
    inputs = list(inputs)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    waiting, tried, outcomes = deque(range(len(inputs))), set(), dict[int, Outcome]()
    pool = [_Worker(context, function, memory) for _ in range(min(workers, len(inputs)))]
    try:
        while len(outcomes) < len(inputs):
            for place, worker in enumerate(pool):
                if worker.number is None and waiting:
                    number = waiting.popleft()
                    worker.send(number, inputs[number])
                report = worker.report(seconds)
                if report is None:
                    continue
                number, (kind, value, spent, peak) = worker.number, report
                if not worker.serving:
                    worker.stop()
                    pool[place] = _Worker(context, function, memory)
                if kind == "hang" and number not in tried:
                    tried.add(number)
                    waiting.append(number)
                else:
                    outcomes[number] = Outcome(inputs[number], kind, value, spent, peak)
                worker.number = None
            connection.wait([worker.link for worker in pool if worker.number is not None], _POLL_SECONDS)
    finally:
        for worker in pool:
            worker.stop()
    return [outcomes[number] for number in range(len(inputs))]


class _Worker:
    """A process that serves inputs one at a time, seen from the parent.

    Attributes:
      link: Connection to the process.
      number: Number of the input that it works on; None if it is free.
      serving: Whether it can serve further inputs.
    """

    def __init__(self, context, function: Callable[[Any], Any], memory: int):
        self.link, remote = context.Pipe()
        self.number: int | None = None
        self.serving = True
        self._memory, self._peak = memory, 0
        self._process = context.Process(target=_serve, args=(remote, function, memory), daemon=True)
        self._process.start()
        remote.close()
        if not self.link.poll(_START_SECONDS):
            self.stop()
            raise TimeoutError("a worker did not start")
        self.link.recv()

    def send(self, number: int, item: Any) -> None:
        self.number, self._started = number, time.monotonic()
        self.link.send(item)

    def report(self, seconds: float) -> tuple[str, Any, float, int] | None:
        """Returns (kind, value, seconds, peak) once the input is done or a bound is exceeded, None before."""
        if self.number is None:
            return None
        spent = time.monotonic() - self._started
        if self.link.poll():
            try:
                kind, value, spent, peak = self.link.recv()
            except (EOFError, ConnectionError):
                return self._end("died", f"its process ended with code {self._exit_code()}", spent)
            self._peak = max(self._peak, peak)
            if self._peak > self._memory:
                return self._end("memory", f"{self._peak >> 20} MB, allowed are {self._memory >> 20}", spent)
            return kind, value, spent, self._peak
        self._peak = max(self._peak, self._resident())
        if self._peak > self._memory:
            return self._end("memory", f"{self._peak >> 20} MB, allowed are {self._memory >> 20}", spent)
        return self._end("hang", f"more than {seconds} s", spent) if spent > seconds else None

    def stop(self) -> None:
        """Kills the process, which may be in the middle of an input."""
        self._process.kill()
        self._process.join()
        self.link.close()

    def _end(self, kind: str, value: str, spent: float) -> tuple[str, str, float, int]:
        self.serving = False
        return kind, value, spent, self._peak

    def _exit_code(self) -> int | str | None:
        self._process.join(1)
        code = self._process.exitcode
        return signal.Signals(-code).name if code is not None and code < 0 else code

    def _resident(self) -> int:
        with contextlib.suppress(OSError), open(f"/proc/{self._process.pid}/statm") as file:
            return int(file.read().split()[1]) * _PAGE
        return 0


def _serve(link: connection.Connection, function: Callable[[Any], Any], memory: int) -> None:
    """Serves inputs until the parent is gone; the kernel refuses far more memory than is allowed before it is used."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * _PAGE
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 4 * memory,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    link.send("ready")
    with contextlib.suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while True:
            item = link.recv()
            start = time.monotonic()
            kind, value = _call(function, item)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            link.send((kind, value, time.monotonic() - start, peak))


def _call(function: Callable[[Any], Any], item: Any) -> tuple[str, Any]:
    try:
        return "result", function(item)
    except InputError as error:
        return "refused", str(error)
    except MemoryError:
        return "memory", traceback.format_exc()
    except Exception:
        return "error", traceback.format_exc()
