"""Measures run times of several sides in turns, and peak rates of the machine."""

import statistics
import time
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp

_PEAK_ROUNDS, _PRODUCTS = 20, 2
_SLOW_EVERY = 3


def in_turns(
    sides: Mapping[str, Callable[[], object]], rounds: int, warm: bool = True, slow: Collection[str] = ()
) -> dict[str, float]:
    """Measures the median run time of each side.

    A round runs every side once, so that other load on the machine affects all of them alike.

    Args:
      sides: Functions by name; each must wait for its own results, which are ignored.
      rounds: Number of rounds.
      warm: Whether to run each side once before the measurement.
      slow: Names of sides that run in every third round only.

    Returns:
      Median seconds by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    if warm:
        for run in sides.values():
            run()
    for index in range(rounds):
        for name, run in sides.items():
            if name in slow and index % _SLOW_EVERY:
                continue
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


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
    seconds = []
    for _ in range(_PEAK_ROUNDS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
