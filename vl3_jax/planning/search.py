"""Many plans of one stage: the settings worth choosing between, and the least change that makes a step fit."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from vl3_jax import config_file
from vl3_jax.parallel.topologies import Topology
from vl3_jax.planning.plan_step import SAMPLES_A_ROW, Plan

# From what repeats most and keeps least to the other end.
REMATS = ("full", "outputs", "dots", "none")
ROWS = (1, 2, 4)  # that each part of the mesh works on at a time

Settings = Mapping[str, Any]
Planner = Callable[[ConfigDict, Topology], Plan]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings to try: a split of the slice, rows at a time for each part of it, remat of tower and decoder."""

    mesh: Mapping[str, int]
    rows: int
    remat: str

    def settings(self, config: ConfigDict) -> dict[str, Any]:
        """As changes of a configuration, which has about as many rows in a step as before."""
        at_a_time = self.rows * self.mesh["data"] * self.mesh["fsdp"]
        wanted = config.batch.rows or config.batch.samples / SAMPLES_A_ROW
        passes = max(round(wanted / at_a_time), 1)
        return {
            **{f"mesh.{axis}": size for axis, size in self.mesh.items()},
            "batch.rows": passes * at_a_time,
            "batch.grad_accum_steps": passes,
            "remat.vision": self.remat,
            "remat.text": self.remat,
        }


def with_settings(config: ConfigDict, settings: Settings) -> ConfigDict:
    """A copy of a configuration with other values."""
    config = copy.deepcopy(config)
    for key, value in settings.items():
        config_file.set_value(config, key, value)
    return config


def meshes(topology: Topology) -> list[dict[str, int]]:
    """Splits of a slice: weights over all of it, over halves that copy each other, and two chips to a row."""
    copies, each = topology.slices, topology.chips // topology.slices
    found = [{"data": copies, "fsdp": each, "tensor": 1, "context": 1}]
    if each > 1:
        halves = {"data": copies, "fsdp": each // 2, "tensor": 1, "context": 1}
        found += [halves | {"data": 2 * copies}, halves | {"tensor": 2}, halves | {"context": 2}]
    return found


def candidates(topology: Topology) -> list[Candidate]:
    """All that `search` may try, those of one mesh together, growing."""
    return [Candidate(*found) for found in itertools.product(meshes(topology), ROWS, REMATS)]


def search(config: ConfigDict, topology: Topology, planner: Planner) -> Iterator[tuple[Candidate, Plan | None]]:
    """Plans every candidate that has a chance; the others have None for a plan.

    More rows, or a policy that keeps more, take more memory: what is at least as large in both as one that did not
    fit on the same mesh is passed over.
    """
    refused: list[Candidate] = []
    for one in candidates(topology):
        if any(_as_large(one, other) for other in refused):
            yield one, None
            continue
        found = planner(with_settings(config, one.settings(config)), topology)
        if not found.fits:
            refused.append(one)
        yield one, found


def _as_large(one: Candidate, other: Candidate) -> bool:
    same = one.mesh == other.mesh
    return same and one.rows >= other.rows and REMATS.index(one.remat) >= REMATS.index(other.remat)


def pareto(plans: Iterable[Plan], mfu: float) -> list[Plan]:
    """Of the plans that fit, those of which no other is both faster and smaller; the fastest first."""
    kept: list[Plan] = []
    for one in sorted((one for one in plans if one.fits), key=lambda one: (-one.speed(mfu), one.memory.peak)):
        if not kept or one.memory.peak < kept[-1].memory.peak:
            kept.append(one)
    return kept


def changes(config: ConfigDict, plan: Plan) -> list[dict[str, Any]]:
    """What could make a plan fit, from what costs least to what costs most.

    A step in more parts; more recomputation; weights split over all chips; two chips to a row; a lighter optimizer.
    """
    found: list[dict[str, Any]] = []
    parts = plan.mesh["data"] * plan.mesh["fsdp"]
    so_far: dict[str, Any] = {}
    if plan.rows > parts * plan.grad_accum_steps:
        so_far = {"batch.grad_accum_steps": plan.rows // parts}
        found.append(so_far)
    lighter = {f"remat.{name}": "full" for name, policy in plan.remat.items() if policy != "full"}
    if lighter:
        so_far = so_far | lighter
        found.append(so_far)
    copies, slices = plan.mesh["data"], plan.topology.slices
    if copies > slices:
        so_far = so_far | {"mesh.data": slices, "mesh.fsdp": plan.mesh["fsdp"] * copies // slices}
        found.append(so_far)
    split = so_far.get("mesh.fsdp", plan.mesh["fsdp"])
    for axis in ("context", "tensor"):
        if split % 2 == 0 and plan.mesh[axis] == 1:
            found.append(so_far | {"batch.grad_accum_steps": 0, "mesh.fsdp": split // 2, f"mesh.{axis}": 2})
    if config.optimizer.first_moment_dtype != "bfloat16":
        found.append(so_far | {"optimizer.first_moment_dtype": "bfloat16"})
    return found


def smallest_change(config: ConfigDict, plan: Plan, planner: Planner) -> tuple[dict[str, Any], Plan] | None:
    """What makes a plan fit that does not, tried in turn.

    Returns:
      The first of `changes` that fits, or a slice twice as large ({"topology": its name}); and the plan it gives. None
      if nothing helps.
    """
    for settings in changes(config, plan):
        found = planner(with_settings(config, settings), plan.topology)
        if found.fits:
            return settings, found
    larger = plan.topology.doubled()
    if larger is None:
        return None
    settings = {"batch.rows": 0} if config.batch.rows else {}  # 0: from the samples of a step
    if config.mesh.fsdp != -1:
        settings["mesh.fsdp"] = 2 * plan.mesh["fsdp"]
    found = planner(with_settings(config, settings), larger)
    return ({"topology": larger.name, **settings}, found) if found.fits else None
