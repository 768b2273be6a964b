"""A cache of compiled steps on disk: compiling takes minutes, and the same program gives the same figures."""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable

import vl3_jax
from vl3_jax import config_tree
from vl3_jax.parallel.topologies import Topology
from vl3_jax.planning.compiler import ProgramAnalysis
from vl3_jax.planning.plan_step import Plan, plan_step
from vl3_jax.storage.journal import Journal
from vl3_jax.training.run_config import RunConfig
from vl3_jax.versions import version


class PlanCache:
    """A file of the figures of compiled steps, one JSON object per line. Calling it plans a step.

    Args:
      path: File that the figures of each new program are appended to; None keeps nothing.

    Raises:
      InputError: The file holds something else.
    """

    def __init__(self, path: str | os.PathLike | None):
        self._journal = Journal(path, _entry, "not a record of plans; give another file") if path else None
        self._found: dict[str, dict] = dict(self._journal.entries if self._journal else [])

    def __call__(self, config: RunConfig, topology: Topology, hlo: pathlib.Path | None = None) -> Plan:
        """Returns the plan of a configuration on a topology, by this code and compiler.

        With `hlo`, all is compiled anew and the optimised HLO text written there.
        """

        def analyze(length: int, compile_step: Callable[[], ProgramAnalysis]) -> ProgramAnalysis:
            key = _key(config, topology, length)
            if key in self._found and hlo is None:
                return ProgramAnalysis.from_json(self._found[key])
            program = compile_step()
            self._found[key] = program.as_json()
            if self._journal:
                self._journal.append({"key": key, "program": program.as_json()})
            return program

        return plan_step(config, topology, hlo, analyze)


def _entry(line: dict) -> tuple[str, dict]:
    return line["key"], line["program"]


def _key(config: RunConfig, topology: Topology, length: int) -> str:
    """Returns what identifies a program; which other lengths a run has makes no difference to it."""
    config = config_tree.replace(config, {"data.shorter_lengths": ()})
    parts = [
        json.dumps(config_tree.to_tree(config), sort_keys=True),
        topology.name,
        str(topology.slices),
        str(length),
        _code_and_compiler(),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@functools.cache
def _code_and_compiler() -> str:
    """Returns what a compiled step depends on: a digest of this package's code, and the versions of the compiler."""
    digest = hashlib.sha256()
    folder = pathlib.Path(vl3_jax.__file__).parent
    for name in ("kernels", "model", "parallel", "planning", "training"):
        for path in sorted((folder / name).glob("*.py")):
            digest.update(path.read_bytes())
    return " ".join([digest.hexdigest(), *(f"{name} {version(name)}" for name in ("jax", "libtpu"))])
