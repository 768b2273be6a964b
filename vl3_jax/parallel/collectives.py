"""Counts the collectives of a compiled program by kind, including their repetitions in loops."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

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
    counts: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()
    pending = [(entry, 1)]
    while pending:
        name, times = pending.pop()
        for shape, operation, line in computations.get(name, ()):
            trips = _TRIPS.search(line) if operation == "while" else None
            runs = times * int(trips[1]) if trips else times
            pending += [(called, runs) for called in _called(line)]
            kind = operation.removesuffix("-start")
            if kind in KINDS:
                counts[kind] += times
                sizes[kind] += times * _result_bytes(shape, operation)
    return {kind: Traffic(counts[kind], sizes[kind]) for kind in KINDS if counts[kind]}


def _computations(text: str) -> tuple[Mapping[str, list[tuple[str, str, str]]], str]:
    """Returns the instructions of each computation by its name, and the name of the entry computation.

    An instruction is the shape of its result, its operation, and its line.
    """
    computations: dict[str, list[tuple[str, str, str]]] = {}
    name = entry = ""
    for line in text.splitlines():
        header, instruction = _COMPUTATION.match(line), _INSTRUCTION.match(line)
        if header:
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif name and instruction:
            computations[name].append((instruction[1], instruction[2], line))
    return computations, entry


def _called(line: str) -> list[str]:
    """Returns the computations that an instruction calls."""
    branches = [name for names in _BRANCHES.findall(line) for name in names.split(",")]
    return [*_CALLED.findall(line), *(name.strip().lstrip("%") for name in branches)]


def _result_bytes(shape: str, operation: str) -> int:
    """Returns the bytes of the result of a collective; an asynchronous pair counts at its start."""
    sizes = [
        math.prod(map(int, filter(None, dimensions.split(",")))) * _BYTES.get(dtype, 0)
        for dtype, dimensions in _SHAPE.findall(shape)
    ]
    # The start of an asynchronous pair lists operand and result; the result of a gather is the larger.
    return max(sizes, default=0) if operation.endswith("-start") else sum(sizes)
