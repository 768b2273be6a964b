"""Checks the data of benchmarks: what is missing, where it belongs, and what its licence asks."""

import dataclasses
import os
from collections.abc import Iterator, Sequence

from vl3_jax.errors import InputError
from vl3_jax.evaluation.benchmark import Benchmark

_SHOWN = 5  # missing files listed by name


@dataclasses.dataclass(frozen=True)
class DataState:
    """The data of one benchmark.

    Attributes:
      benchmark: The benchmark.
      items: Number of its items; 0 if they cannot be read.
      problem: Why the items cannot be read, or None.
      missing: Paths of missing images and videos.
    """

    benchmark: Benchmark
    items: int
    problem: str | None
    missing: Sequence[str]

    @property
    def complete(self) -> bool:
        return self.problem is None and not self.missing and self.items > 0


def check(benchmark: Benchmark, root: str | os.PathLike) -> DataState:
    """Looks for the annotation files of a benchmark and for the images and videos that they name."""
    try:
        items = benchmark.load(root)
    except InputError as error:
        return DataState(benchmark, 0, str(error), ())
    missing = dict.fromkeys(path for item in items for path in item.missing_media())
    return DataState(benchmark, len(items), None, list(missing))


def report(states: Sequence[DataState]) -> Iterator[str]:
    """Yields the lines of a report."""
    for state in states:
        benchmark = state.benchmark
        usual = f", usually {benchmark.size}" if benchmark.size and benchmark.size != state.items else ""
        yield f"{benchmark.task}: {'complete' if state.complete else 'INCOMPLETE'}, {state.items} questions{usual}"
        if state.problem:
            yield f"  {state.problem}"
        elif not state.items:
            yield "  its annotation files hold no questions; download them again"
        yield from (f"  missing: {path}" for path in state.missing[:_SHOWN])
        if len(state.missing) > _SHOWN:
            yield f"  missing: {len(state.missing) - _SHOWN} more images or videos"
        if not state.complete:
            yield f"  from: {benchmark.source}"
            yield from (f"  layout: {line}" for line in benchmark.layout.splitlines())
        yield f"  licence: {benchmark.licence}"
