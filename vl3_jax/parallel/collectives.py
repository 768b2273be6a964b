"""Counts the collectives of a compiled program by kind, including their repetitions in loops."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Traffic of one kind of collective in one run of a program, as one device sees it.

    Attributes:
      count: Number of collectives.
      bytes: Bytes of their results.
    """

    count: int
    bytes: int


def collectives(text: str) -> dict[str, Traffic]:
    """Counts the collectives of a compiled program.

    The body of a loop counts as often as the compiler knows it to run, or once if the compiler does not know. Each
    branch of a conditional counts once.

    Args:
      text: HLO text of the program, from `compiled.as_text()`.

    Returns:
      The traffic of each kind of collective that occurs.
    """
    computations, entry = _computations(text)
    runs: collections.Counter[str] = collections.Counter()
    pending = [(entry, 1)]
    while pending:
        name, times = pending.pop()
        runs[name] += times
        for line in computations.get(name, ()):
            pending += [(called, times * trips) for called, trips in _calls(line)]
    counts: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()
    for name, times in runs.items():
        for line in computations.get(name, ()):
            kind, size = _collective(line)
            if kind:
                counts[kind] += times
                sizes[kind] += times * size
    return {kind: Traffic(counts[kind], sizes[kind]) for kind in KINDS if counts[kind]}


def _computations(text: str) -> tuple[Mapping[str, list[str]], str]:
    """Returns the lines of each computation by its name, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header and not line.startswith(" "):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif name:
            computations[name].append(line)
    return computations, entry


def _calls(line: str) -> Iterator[tuple[str, int]]:
    """Yields the computations that an instruction calls, and how often."""
    instruction = _INSTRUCTION.match(line)
    if not instruction:
        return
    trips = _TRIPS.search(line) if instruction[2] == "while" else None
    for called in _CALLED.findall(line):
        yield called, int(trips[1]) if trips else 1
    branches = _BRANCHES.search(line)
    for called in branches[1].split(",") if branches else ():
        yield called.strip().lstrip("%"), 1


def _collective(line: str) -> tuple[str, int]:
    """Returns kind and bytes of the result of a collective, or ("", 0) for any other instruction.

    An asynchronous pair counts at its start.
    """
    instruction = _INSTRUCTION.match(line)
    if not instruction:
        return "", 0
    shape, operation = instruction[1], instruction[2]
    kind = operation.removesuffix("-start")
    if kind not in KINDS:
        return "", 0
    sizes = [
        math.prod(map(int, filter(None, dimensions.split(",")))) * _BYTES.get(dtype, 0)
        for dtype, dimensions in _SHAPE.findall(shape)
    ]
    # The start of an asynchronous pair lists operand and result; the result of a gather is the larger.
    return kind, max(sizes, default=0) if operation.endswith("-start") else sum(sizes)
