"""Measures run times of several sides in turns, resources of processes, and peak rates of the machine."""

import functools
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from vl3_jax.bench.table import Row

Result = TypeVar("Result")

_PEAK_ROUNDS, _PRODUCTS = 20, 2
_SLOW_EVERY = 3
_POLL_SECONDS = 0.005


def results_in_turns(
    sides: Mapping[str, Callable[[], Result]], rounds: int, warm: bool = True, slow: Collection[str] = ()
) -> dict[str, list[Result]]:
    """Runs every side once in each round, so that other load on the machine affects all of them alike.

    Args:
      sides: Functions by name.
      rounds: Number of rounds.
      warm: Whether to run each side once before the first round.
      slow: Names of sides that run in every third round only.

    Returns:
      The results of all rounds by name.
    """
    if warm:
        for run in sides.values():
            run()
    results: dict[str, list[Result]] = {name: [] for name in sides}
    for index in range(rounds):
        for name, run in sides.items():
            if name not in slow or index % _SLOW_EVERY == 0:
                results[name].append(run())
    return results


def seconds_of(run: Callable[[], object]) -> float:
    """Runs a function and returns the seconds that it takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure_case(
    case: str,
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    amount: float | Mapping[str, float],
    unit: str,
    flops: float | Mapping[str, float] | None = None,
    figures: Callable[[str, float], Mapping[str, float]] = lambda side, seconds: {},
    **turns,
) -> list[Row]:
    """Measures the sides of a case in turns and returns their rows, whose times are medians.

    Each side must wait for its own results, which are ignored.

    Args:
      case: Name of the case.
      sides: Functions by name.
      rounds: Number of rounds.
      amount: Work of a run in `unit`s, of all sides or by side.
      unit: Unit of the work.
      flops: Useful arithmetic of a run, of all sides or by side.
      figures: Returns other numbers of a side from its name and its median seconds.
      **turns: `warm` and `slow` of `results_in_turns`.
    """

    def of(side: str, value):
        return value[side] if isinstance(value, Mapping) else value

    timed = {side: functools.partial(seconds_of, run) for side, run in sides.items()}
    medians = {side: statistics.median(values) for side, values in results_in_turns(timed, rounds, **turns).items()}
    return [
        Row(case, side, seconds, of(side, amount), unit, of(side, flops), figures(side, seconds))
        for side, seconds in medians.items()
    ]


def compiled(function: Callable, *arguments, options: Mapping | None = None) -> Callable[[], object]:
    """Compiles `function` and returns a side that runs it and waits for the results.

    Args:
      function: A function of arrays.
      *arguments: Its arguments in every run.
      options: Compiler options.

    Returns:
      A function without arguments; its attribute `temporaries` is the temporary memory of the program in bytes.
    """
    program = jax.jit(function).lower(*arguments).compile(options)

    def run() -> object:
        return jax.block_until_ready(program(*arguments))

    run.temporaries = program.memory_analysis().temp_size_in_bytes
    return run


def temporaries(sides: Mapping[str, Callable]) -> Callable[[str, float], Mapping[str, float]]:
    """Returns the `figures` of `measure_case` for compiled sides: the temporary memory of their programs."""
    return lambda side, seconds: {"temporaries MB": sides[side].temporaries / 1e6}


class ProcessUsage(NamedTuple):
    """Resources that a child process used: seconds, seconds of CPU, peak of its anonymous memory in bytes."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def run_python(*arguments: str) -> ProcessUsage:
    """Runs `python arguments` in a child process, whose anonymous memory (RssAnon) is sampled.

    Raises:
      subprocess.CalledProcessError: The child failed.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    child = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.DEVNULL)
    peak = 0
    while child.poll() is None:
        peak = max(peak, process_memory("RssAnon", child.pid))
        time.sleep(_POLL_SECONDS)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, child.args)
    return ProcessUsage(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, peak)


def process_memory(field: str, pid: int | str = "self") -> int:
    """Returns a figure of /proc/PID/status, such as VmRSS, in bytes; 0 if there is none or the process has ended."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def matmul_peak(size: int, dtype: str) -> float:
    """Returns the FLOP/s of a product of two [size, size] matrices, the best of several runs."""
    a = jnp.ones((size, size), dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else jax.lax.Precision.DEFAULT

    def products(a: jax.Array, b: jax.Array) -> jax.Array:
        for _ in range(_PRODUCTS):
            b = jnp.matmul(a, b, precision=precision)
        return b

    return _PRODUCTS * 2 * size**3 / _best(compiled(products, a, a / size))


def copy_bandwidth(nbytes: int) -> float:
    """Returns the bytes/s, read and written, of a pass over an array of `nbytes`, the best of several runs."""
    x = jnp.ones(nbytes // 4, jnp.float32)
    return 2 * nbytes / _best(compiled(lambda x: x * 0.5, x))


def _best(run: Callable[[], object]) -> float:
    run()
    return min(seconds_of(run) for _ in range(_PEAK_ROUNDS))
