"""Plans that were made before: compiling takes minutes, and the same program is weighed the same."""

import functools
import hashlib
import json
import os
import pathlib

from ml_collections import ConfigDict

import vl3_jax
from vl3_jax.errors import InputError
from vl3_jax.parallel.topologies import Topology
from vl3_jax.planning.plan_step import Plan, from_json, plan_step
from vl3_jax.versions import version


class PlanCache:
    """A file of plans, one JSON object a line. Calling it plans a step, or looks it up.

    Args:
      path: appended to after each plan; None keeps nothing.

    Raises:
      InputError: the file holds something else.
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

    def __call__(self, config: ConfigDict, topology: Topology) -> Plan:
        """The plan of this configuration on this slice, by this code and compiler."""
        key = _key(config, topology)
        if key in self._found:
            return from_json(self._found[key], topology)
        plan = plan_step(config, topology)
        self._found[key] = plan.as_json()
        if self._path:
            with self._path.open("a") as file:
                file.write(json.dumps({"key": key, "plan": plan.as_json()}) + "\n")
        return plan


def _key(config: ConfigDict, topology: Topology) -> str:
    parts = [json.dumps(json.loads(config.to_json()), sort_keys=True), topology.name, str(topology.slices), _program()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@functools.cache
def _program() -> str:
    """What decides over a compiled step: this package's code, and the compiler."""
    digest = hashlib.sha256()
    folder = pathlib.Path(vl3_jax.__file__).parent
    for name in ("kernels", "model", "parallel", "planning", "training"):
        for path in sorted((folder / name).glob("*.py")):
            digest.update(path.read_bytes())
    return " ".join([digest.hexdigest(), *(f"{name} {version(name)}" for name in ("jax", "libtpu"))])
