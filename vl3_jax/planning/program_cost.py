"""What a compiled program costs on a chip: the compiler's cycles by part of the model, and the collectives' traffic."""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vl3_jax.planning.hlo import Instruction, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Parts of a training step and of the engine's programs, by an expression that the operations' paths contain; the first
# that matches counts.
SCOPES: Mapping[str, str] = {
    "optimizer": r"/optimizer/",
    "loss": r"\(?loss\)*/",
    "embedding": r"/llm/embed/",
    "tower attention": r"/vision/.*/(layers|VisionLayer)/(attn|ln1)\b",
    "tower mlp": r"/vision/.*/(layers|VisionLayer)/(mlp|ln2)\b",
    "decoder attention": r"/llm/.*/(layers|DecoderLayer)/(attn|ln_attn)\b",
    "decoder mlp": r"/llm/.*/(layers|DecoderLayer)/(mlp|ln_mlp)\b",
}
REST = "rest"
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KERNEL_BYTES = re.compile(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"')
_WINDOWED = "windowed_dot_general"
_CHAIN = "chain_id="
_CHANNEL = re.compile(r"channel_id=(\d+)")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Traffic of one kind of collective in one run of a program, as one device sees it.

    Attributes:
      count: Number of collectives.
      bytes: Bytes that pass a device: of the result of a gather, a permutation or an exchange, of the operand of a
        scatter, and twice those of a sum, which is a scatter and a gather.
    """

    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """What one run of a program costs on a chip.

    Attributes:
      cycles: The compiler's estimate of cycles by scope (such as those of `SCOPES`, and "rest"), kernels and
        collectives not included.
      collectives: Traffic by kind.
      synchronous_bytes: Bytes of those collectives that nothing overlaps.
      kernel_bytes: Bytes that those kernels read and write which declare them; others multiply.
      windowed_products: Number of products that the compiler cut into the pieces of a sharded operand.
    """

    cycles: Mapping[str, int]
    collectives: Mapping[str, Traffic]
    synchronous_bytes: int
    kernel_bytes: int
    windowed_products: int

    def as_json(self) -> dict[str, Any]:
        """Returns the figures as `vl3 plan --json` prints them; `from_json` is the inverse."""
        return {
            "cycles": {"total": sum(self.cycles.values()), **self.cycles},
            "collectives": {kind: dataclasses.asdict(traffic) for kind, traffic in self.collectives.items()},
            "synchronous_bytes": self.synchronous_bytes,
            "kernel_bytes": self.kernel_bytes,
            "windowed_products": self.windowed_products,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "ProgramCost":
        """Returns the figures that `as_json` wrote."""
        cycles = {scope: count for scope, count in found["cycles"].items() if scope != "total"}
        collectives = {kind: Traffic(**values) for kind, values in found["collectives"].items()}
        names = ("synchronous_bytes", "kernel_bytes", "windowed_products")
        return cls(cycles, collectives, *(found[name] for name in names))


NO_COST = ProgramCost({}, {}, 0, 0, 0)  # of a program that does not fit


def program_cost(
    text: str, unknown_trips: Mapping[str, int] | None = None, scopes: Mapping[str, str] = SCOPES
) -> ProgramCost:
    """Reads the cost of a program from its optimised HLO.

    Args:
      text: HLO text, from `compiled.as_text()`.
      unknown_trips: See `Program.runs`.
      scopes: Parts of the program whose cycles are told apart, as `SCOPES`.
    """
    program = Program(text)
    runs = program.runs(unknown_trips)
    traffic = list(_collectives(program, runs))
    counts: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()
    for kind, times, size, _ in traffic:
        counts[kind] += times
        sizes[kind] += times * size
    return ProgramCost(
        cycles=_cycles(program, runs, scopes),
        collectives={kind: Traffic(counts[kind], sizes[kind]) for kind in KINDS if counts[kind]},
        synchronous_bytes=sum(times * size for _, times, size, is_synchronous in traffic if is_synchronous),
        kernel_bytes=_kernel_bytes(program, runs),
        windowed_products=sum(
            instruction.opcode == "while" and _WINDOWED in instruction.attributes
            for instructions in program.computations.values()
            for instruction in instructions.values()
        ),
    )


def _cycles(program: Program, runs: Mapping[str, int], scopes: Mapping[str, str]) -> dict[str, int]:
    """Returns the cycles of each scope."""
    cycles: collections.Counter[str] = collections.Counter()
    for name, times in runs.items():
        for instruction in program.computations[name].values():
            estimate = _CYCLES.search(instruction.attributes)
            if estimate:
                cycles[_scope(program, name, instruction, scopes)] += times * int(estimate[1])
    return {scope: cycles[scope] for scope in (*scopes, REST)}


def _kernel_bytes(program: Program, runs: Mapping[str, int]) -> int:
    """Returns the bytes that Pallas kernels declare in their cost estimates."""
    return sum(
        times * int(declared[1])
        for name, times in runs.items()
        for instruction in program.computations[name].values()
        if (declared := _KERNEL_BYTES.search(instruction.attributes))
    )


def _scope(program: Program, computation: str, instruction: Instruction, scopes: Mapping[str, str]) -> str:
    """Returns the scope of an instruction: by its path, or one inside of it, or that of the loop around it."""
    inside = (inner.op_name for called in instruction.called for inner in program.computations.get(called, {}).values())
    around = program.parents[computation][1].op_name if computation in program.parents else ""
    path = next((path for path in (instruction.op_name, *inside, around) if "/" in path), "")
    return next((scope for scope, pattern in scopes.items() if re.search(pattern, path)), REST)


def _collectives(program: Program, runs: Mapping[str, int]) -> Iterator[tuple[str, int, int, bool]]:
    """Yields kind, number, bytes and whether nothing overlaps it, for each collective of a program.

    An asynchronous pair counts at its start, and so does a chain, whose fragments lie in fusions.
    """
    chains: dict[str, tuple[str, int, int]] = {}
    for name, times in runs.items():
        instructions = program.computations[name]
        starts = {
            operand
            for instruction in instructions.values()
            if "AsyncCollectiveStart" in instruction.attributes
            for operand in instruction.operands
        }
        for instruction in instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            kind, size = _traffic(program, name, instruction, kind)
            if _CHAIN not in instruction.attributes:
                yield kind, times, size, not instruction.opcode.endswith("-start")
            elif instruction.name in starts:
                channel = _CHANNEL.search(instruction.attributes)
                key = channel[1] if channel else instruction.name
                chains[key] = max(chains.get(key, (kind, 0, 0)), (kind, times, size))
    for kind, times, size in chains.values():
        yield kind, times, size, False


def _traffic(program: Program, computation: str, instruction: Instruction, kind: str) -> tuple[str, int]:
    """Returns the kind of a collective and its bytes."""
    instructions = program.computations[computation]
    sizes = instruction.array_bytes
    operands = sum(sum(instructions[name].array_bytes) for name in instruction.operands if name in instructions)
    if kind == "all-reduce":
        # The TPU compiler writes a scatter as a fusion of a sum and a slice, named so.
        scattered = computation.startswith("all-reduce-scatter")
        return ("reduce-scatter", operands) if scattered else (kind, 2 * operands)
    if kind == "reduce-scatter":
        return kind, operands
    if instruction.opcode.endswith("-start"):
        # The start of an asynchronous pair lists operands, results and its state, which are scalars.
        results = re.sub(r"\bu32\[\]", "", instruction.shape)
        return kind, sum(dataclasses.replace(instruction, shape=results).array_bytes) - operands
    return kind, sum(sizes)
