"""A search over plans of one run: meshes, rows and remat policies, and the smallest change that makes a step fit."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from vl3_jax import config_tree
from vl3_jax.parallel.topologies import Topology
from vl3_jax.planning.plan_step import Plan
from vl3_jax.planning.typical_row import SAMPLES_PER_ROW
from vl3_jax.training.run_config import RunConfig

# From the policy that recomputes most and keeps least to the opposite.
REMATS = ("full", "outputs", "dots", "none")
ROWS = (1, 2, 4)  # rows that each part of the mesh works on at a time

Settings = Mapping[str, Any]
Planner = Callable[[RunConfig, Topology], Plan]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings to try: a mesh, rows at a time for each part of it, and the remat policy of tower and decoder."""

    mesh: Mapping[str, int]
    rows: int
    remat: str

    def settings(self, config: RunConfig) -> dict[str, Any]:
        """Returns the changes of a configuration; a step keeps about as many rows as it has."""
        at_a_time = self.rows * self.mesh["data"] * self.mesh["fsdp"]
        rows = config.batch.rows or config.batch.samples / SAMPLES_PER_ROW
        microbatches = max(round(rows / at_a_time), 1)
        return {
            **{f"mesh.{axis}": size for axis, size in self.mesh.items()},
            "batch.rows": microbatches * at_a_time,
            "batch.grad_accum_steps": microbatches,
            "remat.vision": self.remat,
            "remat.text": self.remat,
        }


def meshes(topology: Topology) -> list[dict[str, int]]:
    """Returns meshes of a topology: weights over all of a slice, over halves with copies, and two chips to a row."""
    copies, chips = topology.slices, topology.chips // topology.slices
    options = [{"data": copies, "fsdp": chips, "tensor": 1, "context": 1}]
    if chips > 1:
        halves = {"data": copies, "fsdp": chips // 2, "tensor": 1, "context": 1}
        options += [halves | {"data": 2 * copies}, halves | {"tensor": 2}, halves | {"context": 2}]
    return options


def candidates(topology: Topology) -> list[Candidate]:
    """Returns all candidates of `search`, those of one mesh together, in growing size."""
    return [Candidate(*choice) for choice in itertools.product(meshes(topology), ROWS, REMATS)]


def search(config: RunConfig, topology: Topology, planner: Planner) -> Iterator[tuple[Candidate, Plan | None]]:
    """Plans every candidate that may fit and yields each with its plan; None for those that were passed over.

    More rows, or a policy that keeps more, take more memory: a candidate at least as large in both as one that did not
    fit on the same mesh is passed over.
    """
    too_large: list[Candidate] = []
    for candidate in candidates(topology):
        if any(_is_as_large(candidate, other) for other in too_large):
            yield candidate, None
            continue
        plan = planner(config_tree.replace(config, candidate.settings(config)), topology)
        if not plan.fits:
            too_large.append(candidate)
        yield candidate, plan


def _is_as_large(candidate: Candidate, other: Candidate) -> bool:
    same_mesh = candidate.mesh == other.mesh
    return same_mesh and candidate.rows >= other.rows and REMATS.index(candidate.remat) >= REMATS.index(other.remat)


def pareto(plans: Iterable[Plan]) -> list[Plan]:
    """Returns the plans that fit and of which no other is both faster and smaller, the fastest first."""
    best: list[Plan] = []
    for plan in sorted((plan for plan in plans if plan.fits), key=lambda plan: (-plan.speed, plan.program.peak)):
        if not best or plan.program.peak < best[-1].program.peak:
            best.append(plan)
    return best


def changes(config: RunConfig, plan: Plan) -> list[dict[str, Any]]:
    """Returns changes that may make a plan fit, from the cheapest to the most expensive.

    More microbatches; more recomputation; weights split over all chips; two chips to a row; a lighter optimizer.
    """
    options: list[dict[str, Any]] = []
    parts = plan.mesh["data"] * plan.mesh["fsdp"]
    combined: dict[str, Any] = {}
    if plan.rows > parts * plan.grad_accum_steps:
        combined = {"batch.grad_accum_steps": plan.rows // parts}
        options.append(combined)
    lighter = {f"remat.{name}": "full" for name, policy in plan.remat.items() if policy != "full"}
    if lighter:
        combined = combined | lighter
        options.append(combined)
    copies, slices = plan.mesh["data"], plan.topology.slices
    if copies > slices:
        combined = combined | {"mesh.data": slices, "mesh.fsdp": plan.mesh["fsdp"] * copies // slices}
        options.append(combined)
    split = combined.get("mesh.fsdp", plan.mesh["fsdp"])
    for axis in ("context", "tensor"):
        if split % 2 == 0 and plan.mesh[axis] == 1:
            options.append(combined | {"batch.grad_accum_steps": 0, "mesh.fsdp": split // 2, f"mesh.{axis}": 2})
    if config.optimizer.first_moment_dtype != "bfloat16":
        options.append(combined | {"optimizer.first_moment_dtype": "bfloat16"})
    return options


def smallest_change(config: RunConfig, plan: Plan, planner: Planner) -> tuple[dict[str, Any], Plan] | None:
    """Tries `changes` in turn, and then a topology twice as large, until a plan fits.

    Returns:
      The change, {"topology": name} where the slice is larger, and the plan it gives. None if nothing helps.
    """
    for settings in changes(config, plan):
        changed = planner(config_tree.replace(config, settings), plan.topology)
        if changed.fits:
            return settings, changed
    larger = plan.topology.doubled()
    if larger is None:
        return None
    settings = {"batch.rows": 0} if config.batch.rows else {}  # 0 derives them from the samples of a step
    if config.mesh.fsdp != -1:
        settings["mesh.fsdp"] = 2 * plan.mesh["fsdp"]
    changed = planner(config_tree.replace(config, settings), larger)
    return ({"topology": larger.name, **settings}, changed) if changed.fits else None
