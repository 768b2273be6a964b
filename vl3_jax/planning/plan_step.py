"""Plans of a training step: compiled ahead of time for a TPU topology, with its memory, cycles, traffic and FLOPs."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from data_pipelines import mixtures
from vl3_jax.checkpoint import chat_config, hub, open_source
from vl3_jax.errors import InputError
from vl3_jax.model import preset
from vl3_jax.model.config import ModelConfig
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.topologies import Topology
from vl3_jax.planning.compiler import ProgramAnalysis, compile_and_analyze, topology_devices
from vl3_jax.planning.kernel_work import kernel_flops
from vl3_jax.planning.typical_row import SAMPLES_PER_ROW, typical_row
from vl3_jax.training.cross_entropy import TOKEN_BLOCK
from vl3_jax.training.flops import recomputed_flops, step_flops
from vl3_jax.training.run_config import RunConfig
from vl3_jax.training.setup import abstract_batch, build_train_setup, check_rows, grad_accum_steps, rows_for_samples

KERNEL_SHARE = 0.6  # share of the peak at which the attention kernels are assumed to work
# Loops over the supervised tokens of a microbatch, whose number depends on data.
_LOSS_TILES = r"loss\)*/shard_map/while/body/closed_call/while$"
_TASKS = 8  # tasks with a loss of their own; their number hardly matters
_STEPS = 1000  # steps of the learning-rate schedule; likewise

Analyze = Callable[[int, Callable[[], ProgramAnalysis]], ProgramAnalysis]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The figures of a training step on a topology.

    Attributes:
      topology: TPU slice or slices.
      mesh: Size of each mesh axis.
      remat: Rematerialisation policies of tower ("vision") and decoder ("text").
      rows: Rows of a step.
      grad_accum_steps: Microbatches of a step, which run one after another.
      length: Tokens of a row in most steps.
      useful_tokens: Tokens of such a step, padding not counted.
      samples: Samples of such a step.
      useful_share: Share of the arithmetic, without what is recomputed, that is not of padding.
      flops: FLOPs of one step on a chip, by part and in total, useful work only; "recomputed" is what remat adds.
      kernel_flops: FLOPs of one step on a chip that the attention kernels execute, by scope, with all of each block.
      program: The compiler's figures of a chip: the cost of such a step, and the memory of the largest.
    """

    topology: Topology
    mesh: dict[str, int]
    remat: dict[str, str]
    rows: int
    grad_accum_steps: int
    length: int
    useful_tokens: int
    samples: float
    useful_share: float
    flops: dict[str, float]
    kernel_flops: dict[str, float]
    program: ProgramAnalysis

    @property
    def fits(self) -> bool:
        """Whether the program compiled."""
        return self.program.fits

    @property
    def headroom(self) -> int:
        """Bytes of HBM left on a chip; negative where the step does not fit."""
        return self.topology.chip.hbm_bytes - self.program.peak

    @property
    def useful_tokens_per_chip(self) -> float:
        """Tokens of a step on a chip, padding not counted."""
        return self.useful_tokens / self.topology.chips

    @property
    def useful_seconds(self) -> float:
        """Seconds of a step's useful arithmetic at the chip's peak."""
        return self.flops["total"] / self.topology.chip.peak_flops

    @property
    def parts(self) -> dict[str, float]:
        """Predicted seconds of a step, one after another: the compiler's cycles, kernels, and what waits for links.

        Kernels either multiply, or move what they read and write.
        """
        chip, cost = self.topology.chip, self.program.cost
        multiplied = sum(self.kernel_flops.values()) / chip.peak_flops / KERNEL_SHARE
        return {
            "cycles": sum(cost.cycles.values()) / chip.clock,
            "kernels": multiplied + cost.kernel_bytes / chip.hbm_bandwidth,
            "links": cost.synchronous_bytes / chip.link_bandwidth,
        }

    @property
    def seconds(self) -> float:
        """Predicted seconds of a step."""
        return sum(self.parts.values())

    @property
    def predicted_mfu(self) -> float:
        """Predicted model FLOPs utilisation, 0 to 1; 0 of a step that does not fit."""
        return self.useful_seconds / self.seconds if self.fits else 0.0

    @property
    def speed(self) -> float:
        """Predicted tokens per second of all chips, padding not counted; 0 of a step that does not fit."""
        return self.useful_tokens / self.seconds if self.fits else 0.0

    def as_json(self) -> dict[str, Any]:
        """Returns the plan as `vl3 plan --json` prints it."""
        program = self.program
        return {
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "chips": self.topology.chips,
            "mesh": self.mesh,
            "remat": self.remat,
            "rows": self.rows,
            "accumulation": self.grad_accum_steps,
            "fits": program.fits,
            "hbm_bytes_per_chip": {
                "arguments": program.arguments,
                "temporaries": program.temporaries,
                "peak": program.peak,
                "limit": self.topology.chip.hbm_bytes,
            },
            "flops_per_chip": self.flops["total"],
            "flops_by_part": self.flops,
            "kernel_flops": self.kernel_flops,
            **program.cost.as_json(),
            "useful_share": self.useful_share,
            "useful_tokens_per_chip": self.useful_tokens_per_chip,
            "predicted_mfu": self.predicted_mfu,
            "compile_seconds": program.seconds,
            "row_length": self.length,
            "useful_tokens": self.useful_tokens,
            "samples": self.samples,
        }


def plan_step(
    config: RunConfig,
    topology: Topology,
    hlo: pathlib.Path | None = None,
    analyze: Analyze = lambda _, compile: compile(),
) -> Plan:
    """Compiles the training step of a configuration for a topology, for rows of the shortest and the longest length.

    Args:
      config: Configuration of the run; `config.mesh` and `config.batch` decide over mesh and rows.
      topology: TPU slice or slices.
      hlo: File that the optimised HLO text of the step with the shortest rows is written to.
      analyze: Gets the length of rows and a function that compiles the step for them; returns what that returns.

    Raises:
      InputError: No TPU compiler is installed, or the mesh does not fit the topology; one line.
    """
    mesh = make_mesh(vars(config.mesh), topology_devices(topology))
    model_config, settings, row = _model_config(config), mixtures.data_settings(config.data), typical_row(config.data)
    rows = config.batch.rows or rows_for_samples(config.batch, mesh, SAMPLES_PER_ROW)
    check_rows(config.batch, mesh, rows)
    setup = build_train_setup(config, model_config, mesh, rows, _STEPS, _TASKS)
    trained = [group for group, rate in config.optimizer.learning_rates.items() if rate]
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    tiles = -(-row.work.supervised * rows // parts // grad_accum_steps(config.batch, mesh, rows) // TOKEN_BLOCK)

    def compile_for(length: int, hlo: pathlib.Path | None) -> ProgramAnalysis:
        batch = abstract_batch(rows, settings.row_shape(length), mesh)
        with jax.set_mesh(mesh):
            lowered = setup.step.lower(setup.abstract_state, batch)
            return compile_and_analyze(lowered, {_LOSS_TILES: max(tiles, 1)}, hlo)

    program = analyze(row.shape.length, functools.partial(compile_for, row.shape.length, hlo))
    if program.fits and len(settings.lengths) > 1:
        longest = settings.shape.length
        program = _with_memory_of(program, analyze(longest, functools.partial(compile_for, longest, None)))
    kernels = kernel_flops(model_config, mesh, *row.segments, _passed(trained), vars(config.remat))
    work = row.work * rows
    flops = step_flops(model_config, work, trained, config.lora.rank)
    padded_flops = step_flops(model_config, row.padded_work * rows, trained, config.lora.rank)
    useful_share = flops["total"] / padded_flops["total"]
    flops["recomputed"] = recomputed_flops(model_config, work, trained, vars(config.remat))
    return Plan(
        topology=topology,
        mesh=dict(mesh.shape),
        remat=dict(vars(config.remat)),
        rows=rows,
        grad_accum_steps=grad_accum_steps(config.batch, mesh, rows),
        length=row.shape.length,
        useful_tokens=rows * row.tokens,
        samples=rows * row.samples,
        useful_share=useful_share,
        flops={part: total / topology.chips for part, total in flops.items()},
        kernel_flops={scope: rows * total / topology.chips for scope, total in kernels.items()},
        program=program,
    )


def _model_config(config: RunConfig) -> ModelConfig:
    """Returns the sizes of the model preset, or of the initial weights where the configuration names no preset."""
    if config.model:
        return preset(config.model)
    if not config.init_from or (hub.is_hub_id(config.init_from) and not os.path.exists(config.init_from)):
        raise InputError("no sizes to plan for, and a plan downloads no weights; give --config.model, such as 2b or 7b")
    return chat_config(open_source(config.init_from))


def _with_memory_of(program: ProgramAnalysis, larger: ProgramAnalysis) -> ProgramAnalysis:
    """Returns the figures of a program with the memory of a larger one."""
    if not larger.fits:
        return larger
    memory = {name: max(getattr(program, name), getattr(larger, name)) for name in ("temporaries", "peak")}
    return dataclasses.replace(program, **memory, seconds=program.seconds + larger.seconds)


def _passed(trained: list[str]) -> Mapping[str, bool]:
    """Returns whether gradients pass through the layers of tower and decoder."""
    return {"vision": "vision" in trained, "text": bool(trained)}
