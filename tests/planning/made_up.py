"""A planner that compiles nothing: memory and traffic from a formula, so that searching can be tested by itself."""

from ml_collections import ConfigDict

from vl3_jax.parallel.collectives import Traffic
from vl3_jax.parallel.topologies import Topology
from vl3_jax.planning.compiler import GIB, Weight
from vl3_jax.planning.search import REMATS
from vl3_jax.planning.step import Plan


class MadeUp:
    """Weighs `state` GiB over all chips of an fsdp axis, and `row` GiB for each row at a time."""

    def __init__(self, state: float, row: float):
        self.state, self.row = state, row
        self.asked: list[Plan] = []

    def __call__(self, config: ConfigDict, slice_: Topology) -> Plan:
        mesh = {axis: config.mesh[axis] for axis in ("data", "fsdp", "tensor", "context")}
        if mesh["fsdp"] == -1:
            mesh["fsdp"] = slice_.chips // (mesh["data"] * mesh["tensor"] * mesh["context"])
        assert mesh["data"] * mesh["fsdp"] * mesh["tensor"] * mesh["context"] == slice_.chips
        parts = mesh["data"] * mesh["fsdp"]
        rows = config.batch.rows or parts
        accumulation = config.batch.accumulation or rows // parts
        assert rows % (parts * accumulation) == 0
        moments = 2 / 3 if config.optimizer.first_moment_dtype == "bfloat16" else 1
        kept = 1 + REMATS.index(config.remat.text)
        shared = mesh["tensor"] * mesh["context"]
        peak = int(GIB * (self.state * moments / mesh["fsdp"] + self.row * kept * rows / parts / accumulation / shared))
        fits = peak <= slice_.chip.hbm
        traffic = {"all-gather": Traffic(accumulation, int(1e9 * accumulation * shared))} if fits else {}
        weight = Weight(fits, peak // 2 if fits else 0, peak // 2 if fits else 0, peak, traffic, 1.0)
        flops = {"total": 1e12 * rows / slice_.chips, "recomputed": 1e11 * rows / slice_.chips * (4 - kept)}
        plan = Plan(slice_, mesh, dict(config.remat), rows, accumulation, rows * 16_384, flops, weight)
        self.asked.append(plan)
        return plan
