"""Programs whose equal layers are one compiled program, which is called for each of them.

Each instruction of a program takes time to compile, and on a CPU four kilobytes of memory as long as the program is
loaded; a model of 28 layers has tens of thousands. A call takes some microseconds there, and nothing is fetched ahead
for the next layer, so that a part of a prompt is read as fast by calls of one layer.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from vl3_jax.model.remat import is_layer

Atom = core.Var | core.Literal


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of one of the compiled programs of a `LayeredProgram`.

    Attributes:
      program: Its number.
      inputs: Numbers of the values that it takes.
      last: Those of them that nothing takes afterwards.
    """

    program: int
    inputs: tuple[int, ...]
    last: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LayeredProgram:
    """A program as calls of compiled programs.

    Its values are numbered: the leaves of the arguments, then the results of each call.

    Attributes:
      programs: The compiled programs.
      calls: Their calls in order.
      outputs: Numbers of the values that are the leaves of the result.
      out_tree: Structure of the result.
    """

    programs: tuple[jax.stages.Compiled, ...]
    calls: tuple[Call, ...]
    outputs: tuple[int, ...]
    out_tree: Any

    def __call__(self, *arguments: Any) -> Any:
        values = jax.tree.leaves(arguments)
        for index, value in enumerate(values):
            if isinstance(value, np.ndarray):  # once, and not for each call
                values[index] = jax.device_put(value)
        results = []
        for call in self.calls:
            before = results
            results = self.programs[call.program](*(values[index] for index in call.inputs))
            jax.block_until_ready(before)  # because a call holds memory from when it is made
            values += results
            for index in call.last:
                values[index] = None
        return jax.tree.unflatten(self.out_tree, [values[index] for index in self.outputs])


def compile_by_layers(traced: jax.stages.Traced) -> LayeredProgram:
    """Compiles a traced function: what its layers need, each kind of layer once, and the rest.

    Raises:
      ValueError: A layer takes what is computed from the result of another one, outside of the layers.
    """
    return _Compilation(traced).result()


class _Compilation:
    """The values and programs of a `LayeredProgram` while it is made."""

    def __init__(self, traced: jax.stages.Traced):
        self._closed, self._out_tree = traced.jaxpr, jax.tree.structure(traced.out_info)
        inputs, described = self._closed.jaxpr.invars, jax.tree.leaves(traced.args_info)
        self._donated = {id(atom) for atom, argument in zip(inputs, described, strict=True) if argument.donated}
        self._numbers = {id(atom): number for number, atom in enumerate(inputs)}
        self._num_values = len(inputs)
        self._programs: list[jax.stages.Compiled] = []
        self._layers: dict[tuple, int] = {}
        self._calls: list[tuple[int, tuple[int, ...]]] = []

    def result(self) -> LayeredProgram:
        jaxpr = self._closed.jaxpr
        before, layers, behind = _split(jaxpr.eqns)
        literals = [atom for atom in jaxpr.outvars if isinstance(atom, core.Literal)]
        needed = [*_inputs([*layers, *behind]), *jaxpr.outvars]
        self._add_segment(before, [*_outputs(before), *jaxpr.constvars, *literals], needed)
        for layer in layers:
            self._add_layer(layer)
        self._add_segment(behind, _outputs(behind), jaxpr.outvars)
        outputs = tuple(self._numbers[id(atom)] for atom in jaxpr.outvars)
        last = {number: index for index, (_, inputs) in enumerate(self._calls) for number in inputs}
        calls = (
            Call(program, inputs, tuple(number for number in inputs if last[number] == index and number not in outputs))
            for index, (program, inputs) in enumerate(self._calls)
        )
        return LayeredProgram(tuple(self._programs), tuple(calls), outputs, self._out_tree)

    def _add_segment(self, equations: list[core.JaxprEqn], made: Sequence[Atom], needed: Sequence[Atom]) -> None:
        """Adds a program of equations and constants, and its call.

        Args:
          equations: The equations.
          made: The results of the equations, and constants.
          needed: What is needed afterwards.
        """
        found, wanted = _by_id(made), _by_id(needed)
        outputs = [atom for key, atom in found.items() if key in wanted]
        if outputs:
            inputs = [atom for key, atom in _by_id(_inputs(equations)).items() if key not in found]
            freed = [atom for atom in inputs if id(atom) in self._donated and id(atom) not in wanted]
            self._add_call(self._compile(equations, inputs, outputs, freed), inputs, outputs)

    def _add_layer(self, layer: core.JaxprEqn) -> None:
        """Adds the call of a layer, and its program unless it is that of an earlier one."""
        inputs, outputs = list(_by_id(_inputs([layer])).values()), _outputs([layer])
        taken = (inputs.index(atom) if isinstance(atom, core.Var) else f"{atom.val}" for atom in layer.invars)
        kind = (id(layer.params["jaxpr"]), *taken, *(atom in outputs for atom in layer.outvars))
        if kind not in self._layers:
            self._layers[kind] = self._compile([layer], inputs, outputs)
        self._add_call(self._layers[kind], inputs, outputs)

    def _add_call(self, program: int, inputs: Sequence[core.Var], outputs: Sequence[Atom]) -> None:
        self._calls.append((program, tuple(self._numbers[id(atom)] for atom in inputs)))
        self._numbers |= {id(atom): self._num_values + index for index, atom in enumerate(outputs)}
        self._num_values += len(outputs)

    def _compile(
        self,
        equations: Sequence[core.JaxprEqn],
        inputs: Sequence[core.Var],
        outputs: Sequence[Atom],
        donated: Sequence[core.Var] = (),
    ) -> int:
        """Compiles equations, and returns the number of the program."""
        jaxpr = self._closed.jaxpr
        constants = [pair for pair in zip(jaxpr.constvars, self._closed.consts, strict=True) if pair[0] not in inputs]
        names, values = [name for name, _ in constants], [value for _, value in constants]
        part = jaxpr.replace(constvars=names, invars=[*inputs], outvars=[*outputs], eqns=[*equations])
        function = core.jaxpr_as_fun(core.ClosedJaxpr(part, values))
        types: Any = (atom.aval for atom in inputs)
        shapes = (jax.ShapeDtypeStruct(array.shape, array.dtype) for array in types)
        program = jax.jit(function, donate_argnums=[inputs.index(atom) for atom in donated]).lower(*shapes).compile()
        self._programs.append(program)
        return len(self._programs) - 1


def _split(
    equations: Sequence[core.JaxprEqn],
) -> tuple[list[core.JaxprEqn], list[core.JaxprEqn], list[core.JaxprEqn]]:
    """Returns the equations whose results the layers need, the layers, and all others."""
    before, layers, behind = [], [], []
    needed = set()
    for equation in reversed(equations):
        if is_layer(equation):
            layers.insert(0, equation)
        elif needed.isdisjoint(_outputs([equation])):
            behind.insert(0, equation)
            continue
        else:
            before.insert(0, equation)
        needed.update(_inputs([equation]))
    if not set(_inputs(before)).isdisjoint(_outputs(layers)):
        raise ValueError("a layer takes what is computed from the result of another one, outside of the layers")
    return before, layers, behind


def _inputs(equations: Iterable[core.JaxprEqn]) -> list[core.Var]:
    return [x for equation in equations for x in equation.invars if isinstance(x, core.Var)]


def _outputs(equations: Iterable[core.JaxprEqn]) -> list[core.Var]:
    return [x for equation in equations for x in equation.outvars if not isinstance(x, core.DropVar)]


def _by_id(atoms: Iterable[Atom]) -> dict[int, Any]:
    """Returns different variables and literals, which cannot be hashed."""
    return {id(atom): atom for atom in atoms}
