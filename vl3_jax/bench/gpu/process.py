"""The process of one part: it measures the part's cases and sends each of them as soon as it is done."""

import gc
import math
import os
import pathlib
import pkgutil
from multiprocessing.connection import Connection
from typing import Any

from vl3_jax.bench.gpu import Part
from vl3_jax.bench.gpu.cases import Case, Conditions, UnavailableError

MACHINE, MEASUREMENT, ERROR = "machine", "measurement", "error"  # kinds of messages
_LONGEST = 400  # characters of an error


def run_part(part: Part, conditions: Conditions, cache: pathlib.Path, describe: bool, sender: Connection) -> None:
    """Runs a part and sends pairs of a kind and a content.

    Args:
      part: The part.
      conditions: What its cases depend on.
      cache: Folder of compiled programs, unless the user has chosen one.
      describe: Whether to send a description of the machine first.
      sender: Where to send.
    """
    # Before anything imports jax.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    for name, value in part.environment.items():
        os.environ.setdefault(name, value)
    try:
        cases = pkgutil.resolve_name(part.cases)
        if describe:
            sender.send((MACHINE, _machine()))
        for case in cases(conditions):
            sender.send((MEASUREMENT, measure(case)))
            gc.collect()  # what a failed case has left on the device
    except Exception as error:
        sender.send((ERROR, one_line(error)))


def measure(case: Case) -> dict[str, Any]:
    """Measures a case.

    Returns:
      Its fields and figures; `error` if it failed, and `out_of_memory` if that was the reason; `note` if this machine
      has no such side.
    """
    figures: dict[str, Any] = {}
    try:
        case.measure(figures)
    except UnavailableError as error:
        figures["note"] = str(error)
    except Exception as error:
        figures["error"] = one_line(error)
        if "RESOURCE_EXHAUSTED" in figures["error"] or "out of memory" in figures["error"].lower():
            figures["out_of_memory"] = True
    for name, value in list(figures.items()):
        if isinstance(value, float) and not math.isfinite(value):  # which JSON cannot hold
            del figures[name]
            figures.setdefault("error", f"{name} is {value}")
    return {**case.fields, **figures}


def one_line(error: Exception) -> str:
    """Describes an exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LONGEST]


def _machine() -> dict[str, Any]:
    """Returns the description of the machine that all benchmarks give, and the memory of the device in bytes."""
    import jax

    from vl3_jax.bench.settings import machine

    memory = jax.devices()[0].memory_stats() or {}
    return {**machine(), "memory_bytes": memory.get("bytes_limit")}
