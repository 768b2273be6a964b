"""A planner without a compiler: memory and traffic follow a formula, so that the search can be tested by itself."""

from vl3_jax.parallel.topologies import GIB, Topology
from vl3_jax.planning.compiler import ProgramAnalysis
from vl3_jax.planning.plan_step import Plan
from vl3_jax.planning.program_cost import NO_COST, ProgramCost, Traffic
from vl3_jax.planning.search import REMATS
from vl3_jax.training.run_config import RunConfig


class FakePlanner:
    """Plans `state` GiB over all chips of an fsdp axis, and `row` GiB for each row at a time."""

    def __init__(self, state: float, row: float):
        self.state, self.row = state, row
        self.plans: list[Plan] = []
        self.compiled = 0

    def __call__(self, config: RunConfig, topology: Topology, hlo=None, analyze=None) -> Plan:
        mesh = dict(vars(config.mesh))
        if mesh["fsdp"] == -1:
            mesh["fsdp"] = topology.chips // (mesh["data"] * mesh["tensor"] * mesh["context"])
        assert mesh["data"] * mesh["fsdp"] * mesh["tensor"] * mesh["context"] == topology.chips
        parts = mesh["data"] * mesh["fsdp"]
        rows = config.batch.rows or parts
        grad_accum_steps = config.batch.grad_accum_steps or rows // parts
        assert rows % (parts * grad_accum_steps) == 0
        moments = 2 / 3 if config.optimizer.first_moment_dtype == "bfloat16" else 1
        kept = 1 + REMATS.index(config.remat.text)
        shared = mesh["tensor"] * mesh["context"]
        peak = int(
            GIB * (self.state * moments / mesh["fsdp"] + self.row * kept * rows / parts / grad_accum_steps / shared)
        )
        fits = peak <= topology.chip.hbm_bytes
        useful, repeated = 1e12 * rows / topology.chips, 1e11 * rows / topology.chips * (4 - kept)
        traffic = Traffic(grad_accum_steps, int(1e9 * grad_accum_steps * shared))
        cycles = {"rest": int((useful + repeated) / topology.chip.peak_flops * topology.chip.clock)}
        cost = ProgramCost(cycles, {"all-gather": traffic}, 0, 0, 0) if fits else NO_COST
        program = ProgramAnalysis(fits, peak // 2 if fits else 0, peak // 2 if fits else 0, peak, cost, 1.0)

        def compile_step() -> ProgramAnalysis:
            self.compiled += 1
            return program

        plan = Plan(
            topology,
            mesh,
            dict(vars(config.remat)),
            rows,
            grad_accum_steps,
            16_384,
            useful_tokens=rows * 11_000,
            samples=rows * 2.35,
            useful_share=0.8,
            flops={"total": useful, "recomputed": repeated},
            kernel_flops={"tower attention": 1e11 * rows / topology.chips},
            program=analyze(16_384, compile_step) if analyze else compile_step(),
        )
        self.plans.append(plan)
        return plan
