"""Stopwatches: sides measured in turns, and what the machine can do at best."""

import statistics
import time
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp

_PEAK_ROUNDS, _PRODUCTS = 20, 2
_SLOW = 3


def in_turns(
    sides: Mapping[str, Callable[[], object]], rounds: int, warm: bool = True, slow: Collection[str] = ()
) -> dict[str, float]:
    """Median seconds of each side. A round runs all of them once, so that a busy machine is busy for all.

    Args:
      sides: each runs to its end, and returns what it likes.
      rounds: how many.
      warm: whether each runs once before, unmeasured.
      slow: sides that run in every third round only.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    if warm:
        for run in sides.values():
            run()
    for number in range(rounds):
        for name, run in sides.items():
            if name in slow and number % _SLOW:
                continue
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compiled(function: Callable, *arguments, options: Mapping | None = None) -> Callable[[], object]:
    """A side that runs `function` on the device, compiled now; it has an attribute `temporaries`, in bytes.

    Args:
      function: of arrays.
      *arguments: what it is given in every run.
      options: for the compiler.
    """
    program = jax.jit(function).lower(*arguments).compile(options)

    def run() -> object:
        return jax.block_until_ready(program(*arguments))

    run.temporaries = program.memory_analysis().temp_size_in_bytes
    return run


def matmul_peak(size: int, dtype: str) -> float:
    """FLOP/s of products of square matrices, the best of a few."""
    a = jnp.ones((size, size), dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else jax.lax.Precision.DEFAULT

    def products(a: jax.Array, b: jax.Array) -> jax.Array:
        for _ in range(_PRODUCTS):
            b = jnp.matmul(a, b, precision=precision)
        return b

    return _PRODUCTS * 2 * size**3 / _best(compiled(products, a, a / size))


def copy_bandwidth(nbytes: int) -> float:
    """Bytes/s, read and written, of a pass over that many; the best of a few."""
    x = jnp.ones(nbytes // 4, jnp.float32)
    return 2 * nbytes / _best(compiled(lambda x: x * 0.5, x))


def _best(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(_PEAK_ROUNDS):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
