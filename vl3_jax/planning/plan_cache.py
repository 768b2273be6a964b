"""A cache of plans on disk: compiling takes minutes, and the same program gives the same figures."""

import functools
import hashlib
import json
import os
import pathlib

import vl3_jax
from vl3_jax import config_tree
from vl3_jax.parallel.topologies import Topology
from vl3_jax.planning.plan_step import Plan, from_json, plan_step
from vl3_jax.storage.journal import Journal
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
        self._journal = Journal(path, _entry, "not a record of plans; give another file") if path else None
        self._found: dict[str, dict] = dict(self._journal.entries if self._journal else [])

    def __call__(self, config: RunConfig, topology: Topology, hlo: pathlib.Path | None = None) -> Plan:
        """Returns the plan of a configuration on a topology, by this code and compiler.

        With `hlo`, it is compiled anew and its optimised HLO text written there.
        """
        key = _key(config, topology)
        if key in self._found and hlo is None:
            return from_json(self._found[key], topology)
        plan = plan_step(config, topology, hlo)
        self._found[key] = plan.as_json()
        if self._journal:
            self._journal.append({"key": key, "plan": plan.as_json()})
        return plan


def _entry(line: dict) -> tuple[str, dict]:
    return line["key"], line["plan"]


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
