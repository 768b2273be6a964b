"""Optimised HLO text of a compiled program, read into computations, instructions and the number of times they run."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>.*?) (?P<opcode>[\w\-]+)\((?P<rest>.*)$"
)
_NAME = re.compile(r"%?([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_FALSE_BRANCH = re.compile(r"false_computation=%?([\w.\-]+)")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_INDEX = re.compile(r"\bindex=(\d+)")
_DIRECTION = re.compile(r"direction=(\w+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: Name, unique in the program.
      shape: Text of the result's shape, a tuple in parentheses.
      opcode: Operation, such as "fusion" or "all-gather-start".
      operands: Names of the operands; the literal of a constant, the number of a parameter.
      attributes: The text after the operands.
      is_root: Whether this is the result of its computation.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """Path of the JAX operation that this comes from, with its named scopes; empty if the compiler made it."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that this calls."""
        branches = _BRANCHES.search(self.attributes)
        return (*_CALLED.findall(self.attributes), *(_NAME.findall(branches[1]) if branches else ()))

    @property
    def false_branch(self) -> str:
        """Name of the computation that a conditional calls where its predicate is false."""
        branches = _BRANCHES.search(self.attributes)
        pattern, text = (_NAME, branches[1]) if branches else (_FALSE_BRANCH, self.attributes)
        return pattern.findall(text)[0]

    @property
    def array_bytes(self) -> list[int]:
        """Bytes of each array of the result."""
        return [
            math.prod(map(int, filter(None, sizes.split(",")))) * BYTES.get(dtype, 0)
            for dtype, sizes in _ARRAY.findall(self.shape)
        ]


class Program:
    """A compiled program.

    Attributes:
      computations: Instructions of each computation, by name.
      entry: Name of the computation that runs first.
      parents: For each computation that is called, the calling computation and instruction.

    Args:
      text: HLO text, from `compiled.as_text()`.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, name = "", ""
        for line in text.splitlines():
            header = _COMPUTATION.match(line)
            if header:
                name = header["name"]
                self.computations[name] = {}
                self.entry = name if header["entry"] else self.entry
            elif name and (instruction := _parse(line)):
                self.computations[name][instruction.name] = instruction
        self.parents: dict[str, tuple[str, Instruction]] = {
            called: (name, instruction)
            for name, instructions in self.computations.items()
            for instruction in instructions.values()
            for called in instruction.called
        }

    def root(self, computation: str) -> Instruction:
        """Returns the instruction whose result is the computation's."""
        return next(instruction for instruction in self.computations[computation].values() if instruction.is_root)

    def runs(self, unknown_trips: Mapping[str, int] | None = None, untaken: str | None = None) -> dict[str, int]:
        """Returns how often each computation runs in one run of the program.

        Each branch of a conditional counts once, but for those that are not taken.

        Args:
          untaken: Regular expression of the `op_name` of conditionals whose predicate is false.
          unknown_trips: Trips of loops whose number depends on data, by a regular expression that their `op_name`
            contains; those of no entry count once.
        """
        runs: collections.Counter[str] = collections.Counter()
        pending = [(self.entry, 1)]
        while pending:
            name, times = pending.pop()
            runs[name] += times
            for instruction in self.computations.get(name, {}).values():
                trips = 1
                if instruction.opcode == "while":
                    known = (
                        count
                        for pattern, count in (unknown_trips or {}).items()
                        if re.search(pattern, instruction.op_name)
                    )
                    trips = self.trips(name, instruction) or next(known, 1)
                called = instruction.called
                if instruction.opcode == "conditional" and untaken and re.search(untaken, instruction.op_name):
                    called = (instruction.false_branch,)
                pending += [(computation, times * trips) for computation in called]
        return dict(runs)

    def trips(self, computation: str, loop: Instruction) -> int | None:
        """Returns how often the body of a loop runs; None if that depends on data.

        Compilers for CPU and GPU write the number down. The one for TPUs does not, so that it is read from the
        condition, which compares a counter with its bound, and from the step that the body adds to it.
        """
        known = _KNOWN_TRIPS.search(loop.attributes)
        if known:
            return int(known[1])
        condition, body = (re.search(rf"{key}=%?([\w.\-]+)", loop.attributes) for key in ("condition", "body"))
        if condition is None or body is None:
            return None
        test = self.root(condition[1])
        direction = _DIRECTION.search(test.attributes)
        if test.opcode != "compare" or direction is None or direction[1] not in ("LT", "GT", "NE"):
            return None
        counter, bound = test.operands if direction[1] != "GT" else test.operands[::-1]
        index = _INDEX.search(self.computations[condition[1]][counter].attributes)
        limit = self._value(condition[1], bound)
        start = index and self._operand_value(computation, loop, int(index[1]))
        if limit is None or start is None or index is None:
            return None
        following = self._element(body[1], self.root(body[1]), int(index[1]), {int(index[1]): start})
        if following is None or following <= start:
            return None
        return max(-(-(limit - start) // (following - start)), 0)

    def _operand_value(self, computation: str, loop: Instruction, index: int) -> int | None:
        """Returns the integer that a loop starts with in one element of its state; None if it is not constant."""
        return self._element(computation, self.computations[computation][loop.operands[0]], index, {})

    def _element(self, computation: str, value: Instruction, index: int, state: Mapping[int, int]) -> int | None:
        """Returns one element of a tuple."""
        if value.opcode == "tuple":
            return self._value(computation, value.operands[index], state)
        if value.opcode == "parameter":
            return self._state(computation, index, state)
        return None

    def _value(self, computation: str, name: str, state: Mapping[int, int] | None = None) -> int | None:
        """Returns the integer that an instruction computes from constants and the known state of a loop, or None."""
        instruction = self.computations[computation].get(name)
        if instruction is None or not re.match(r"[su]\d+\[\]", instruction.shape):
            return None
        operand = functools.partial(self._value, computation, state=state)
        match instruction.opcode:
            case "constant":
                return int(instruction.operands[0])
            case "copy" | "bitcast" | "convert":
                return operand(instruction.operands[0])
            case "add":
                values = [operand(name) for name in instruction.operands]
                return None if None in values else sum(value for value in values if value is not None)
            case "get-tuple-element":
                index = _INDEX.search(instruction.attributes)
                source = self.computations[computation][instruction.operands[0]]
                return self._element(computation, source, int(index[1]), state or {}) if index else None
        return None

    def _state(self, computation: str, index: int, state: Mapping[int, int]) -> int | None:
        """Returns an element of the state of the loop that a computation belongs to, if it never changes."""
        if index in state:
            return state[index]
        parent, loop = self.parents.get(computation, ("", None))
        if loop is None or loop.opcode != "while":
            return None
        body = re.search(r"body=%?([\w.\-]+)", loop.attributes)
        if body is None or not self._is_unchanged(body[1], index):
            return None
        return self._operand_value(parent, loop, index)

    def _is_unchanged(self, body: str, index: int) -> bool:
        """Returns whether the body of a loop passes an element of its state on as it is."""
        root = self.root(body)
        if root.opcode != "tuple":
            return False
        passed = self.computations[body][root.operands[index]]
        while passed.opcode in ("copy", "bitcast"):
            passed = self.computations[body][passed.operands[0]]
        if passed.opcode != "get-tuple-element":
            return False
        source = self.computations[body][passed.operands[0]]
        found = _INDEX.search(passed.attributes)
        return source.opcode == "parameter" and found is not None and int(found[1]) == index


def _parse(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    operands, attributes = _split_operands(found["rest"])
    return Instruction(found["name"], found["shape"], found["opcode"], operands, attributes, bool(found["root"]))


def _split_operands(rest: str) -> tuple[tuple[str, ...], str]:
    """Splits the text after an instruction's opening parenthesis into operands and attributes."""
    depth = 1
    for position, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            text = re.sub(r"/\*.*?\*/", "", rest[:position])
            return tuple(_operand_names(text)), rest[position + 1 :]
    return (), rest


def _operand_names(text: str) -> Iterator[str]:
    """Yields the operands' names; text compiled for some platforms repeats the shape before each name."""
    if "%" in text:
        yield from re.findall(r"%([\w.\-]+)", text)
    else:
        yield from (part.strip() for part in text.split(",") if part.strip())
