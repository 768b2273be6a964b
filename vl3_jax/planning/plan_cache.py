"""A cache of plans on disk: compiling takes minutes, and the same program gives the same figures."""

import functools
import hashlib
import json
import os
import pathlib

import vl3_jax
from vl3_jax import config_tree
from vl3_jax.errors import InputError
from vl3_jax.parallel.topologies import Topology
from vl3_jax.planning.plan_step import Plan, from_json, plan_step
from vl3_jax.training.run_config import RunConfig
from vl3_jax.versions import version


class PlanCache:
    """A file of plans, one JSON object per line. Calling it plans a step, or looks it up.

    Args:
      path: File that each new plan is appended to; None keeps nothing.

    Raises:
      InputError: The file holds something else.
    """

    def __init__(self, path: str | os.PathLike | None):
        self._path = pathlib.Path(path) if path else None
        self._found: dict[str, dict] = {}
        lines = self._path.read_text().splitlines() if self._path and self._path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                self._found[entry["key"]] = entry["plan"]
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{path}, line {number}: not a record of plans; give another file") from None

    def __call__(self, config: RunConfig, topology: Topology) -> Plan:
        """Returns the plan of a configuration on a topology, by this code and compiler."""
        key = _key(config, topology)
        if key in self._found:
            return from_json(self._found[key], topology)
        plan = plan_step(config, topology)
        self._found[key] = plan.as_json()
        if self._path:
            with self._path.open("a") as file:
                file.write(json.dumps({"key": key, "plan": plan.as_json()}) + "\n")
        return plan


def _key(config: RunConfig, topology: Topology) -> str:
    parts = [
        json.dumps(config_tree.to_tree(config), sort_keys=True),
        topology.name,
        str(topology.slices),
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
