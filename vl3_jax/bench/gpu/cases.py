"""What a part of the script consists of, and how a case is timed."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_ROUNDS, _ROUND_SECONDS, _MOST_CALLS = 5, 0.1, 100


class Conditions(NamedTuple):
    """What the cases of a part depend on.

    Attributes:
      small: Whether sizes are tiny, to check that everything runs; the figures then mean nothing.
      flops_per_second: Measured FLOP/s of a large matrix product; None if it was not measured.
      bytes_per_second: Measured bytes/s of a copy, read and written; None likewise.
    """

    small: bool
    flops_per_second: float | None = None
    bytes_per_second: float | None = None

    @property
    def rounds(self) -> int:
        """Number of measurements of a case."""
        return 1 if self.small else _ROUNDS

    def compiler_options(self, platform: str) -> dict[str, Any] | None:
        """Returns the options of large programs: in miniature, a CPU would compile for longer than anything else."""
        return {"xla_backend_optimization_level": 0} if self.small and platform == "cpu" else None


class Case(NamedTuple):
    """A case of a part.

    Attributes:
      fields: What is measured, by name.
      measure: Measures it and enters the figures into a dictionary. Those entered before it raises are kept.
    """

    fields: Mapping[str, str | int]
    measure: Callable[[dict[str, Any]], None]


class UnavailableError(Exception):
    """Raised by a side that this machine does not have; the message says why."""


def seconds_per_call(call: Callable[[], Any], wait: Callable[[Any], Any], conditions: Conditions) -> list[float]:
    """Times a function that starts work on a device and returns before the work is done.

    The calls of a round are started one after another without waiting, which hides the time that starting one takes.

    Args:
      call: The function.
      wait: Waits for a result of `call`.
      conditions: Decide over the number of rounds.

    Returns:
      The seconds of a call in each round.
    """

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        wait(result)
        return (time.perf_counter() - start) / calls

    timed(1)  # compiles
    calls = 1 if conditions.small else min(max(round(_ROUND_SECONDS / timed(1)), 1), _MOST_CALLS)
    return [timed(calls) for _ in range(conditions.rounds)]
