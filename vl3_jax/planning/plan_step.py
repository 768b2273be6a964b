"""Plans of a training step: compiled ahead of time for a TPU topology, with its memory, cycles, traffic and FLOPs."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from data_pipelines import mixtures
from vl3_jax.model import preset
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.rules import batch_shardings
from vl3_jax.parallel.topologies import Topology
from vl3_jax.planning.compiler import ProgramAnalysis, compile_and_analyze, topology_devices
from vl3_jax.planning.kernel_work import kernel_flops
from vl3_jax.planning.program_cost import ProgramCost
from vl3_jax.processing.packed_batch import BatchShape, pack
from vl3_jax.training.cross_entropy import TOKEN_BLOCK
from vl3_jax.training.flops import StepWork, recomputed_flops, step_flops
from vl3_jax.training.run_config import RunConfig
from vl3_jax.training.setup import build_train_setup, check_rows, grad_accum_steps, rows_for_samples

# How full rows are, and of what: measured in the proportions of stage 4 (docs/benchmarks.md).
TOKEN_FILL, PATCH_FILL = 0.69, 0.97
SAMPLES_PER_ROW, FRAME_PATCHES, SUPERVISED = 2.35, 400, 0.15
KERNEL_SHARE = 0.6  # share of the peak at which the attention kernels are assumed to work
# Loops over the supervised tokens of a microbatch, whose number depends on data.
_LOSS_TILES = r"loss\)*/shard_map/while/body/closed_call/while$"
_TASKS = 8  # tasks with a loss of their own; their number hardly matters
_STEPS = 1000  # steps of the learning-rate schedule; likewise


@dataclasses.dataclass(frozen=True)
class Plan:
    """The figures of a training step on a topology.

    Attributes:
      topology: TPU slice or slices.
      mesh: Size of each mesh axis.
      remat: Rematerialisation policies of tower ("vision") and decoder ("text").
      rows: Rows of a step.
      grad_accum_steps: Microbatches of a step, which run one after another.
      tokens: Tokens of a step, padding included.
      useful_share: Share of the arithmetic, without what is recomputed, that is not of padding.
      flops: FLOPs of one step on a chip, by part and in total, useful work only; "recomputed" is what remat adds.
      kernel_flops: FLOPs of one step on a chip that the attention kernels execute, by scope, with all of each block.
      program: The compiler's figures of a chip.
    """

    topology: Topology
    mesh: dict[str, int]
    remat: dict[str, str]
    rows: int
    grad_accum_steps: int
    tokens: int
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
        return self.tokens * TOKEN_FILL / self.topology.chips

    @property
    def useful_seconds(self) -> float:
        """Seconds of a step's useful arithmetic at the chip's peak."""
        return self.flops["total"] / self.topology.chip.peak_flops

    @property
    def parts(self) -> dict[str, float]:
        """Predicted seconds of a step, one after another: the compiler's cycles, kernels, and what waits for links."""
        chip, cost = self.topology.chip, self.program.cost
        return {
            "cycles": sum(cost.cycles.values()) / chip.clock,
            "kernels": sum(self.kernel_flops.values()) / chip.peak_flops / KERNEL_SHARE,
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
        return self.tokens * TOKEN_FILL / self.seconds if self.fits else 0.0

    def as_json(self) -> dict[str, Any]:
        """Returns the plan as `vl3 plan --json` prints it; `from_json` is the inverse."""
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
            "tokens_per_step": self.tokens,
        }


def from_json(found: dict[str, Any], topology: Topology) -> Plan:
    """Returns the plan of a topology that `as_json` wrote."""
    hbm = found["hbm_bytes_per_chip"]
    sizes = (hbm["arguments"], hbm["temporaries"], hbm["peak"])
    program = ProgramAnalysis(found["fits"], *sizes, ProgramCost.from_json(found), found["compile_seconds"])
    same = {name: found[name] for name in ("mesh", "remat", "rows", "useful_share", "kernel_flops")}
    return Plan(
        topology,
        **same,
        grad_accum_steps=found["accumulation"],
        tokens=found["tokens_per_step"],
        flops=found["flops_by_part"],
        program=program,
    )


def plan_step(config: RunConfig, topology: Topology, hlo: pathlib.Path | None = None) -> Plan:
    """Compiles the training step of a configuration for a topology.

    Args:
      config: Configuration of the run; `config.mesh` and `config.batch` decide over mesh and rows.
      topology: TPU slice or slices.
      hlo: File that the optimised HLO text of the step is written to.

    Raises:
      InputError: No TPU compiler is installed, or the mesh does not fit the topology; one line.
    """
    mesh = make_mesh(vars(config.mesh), topology_devices(topology))
    model_config, shape = preset(config.model), mixtures.data_settings(config.data).shape
    rows = config.batch.rows or rows_for_samples(config.batch, mesh, SAMPLES_PER_ROW)
    check_rows(config.batch, mesh, rows)
    setup = build_train_setup(config, model_config, mesh, rows, _STEPS, _TASKS)
    arrays = {
        name: jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype) for name, array in pack([[]], shape).items()
    }
    shardings = batch_shardings(arrays, mesh)
    batch = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=shardings[name]) for name, array in arrays.items()
    }
    row = _row_work(config, shape)
    trained = [group for group, rate in config.optimizer.learning_rates.items() if rate]
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    tiles = -(-row.supervised * rows // parts // grad_accum_steps(config.batch, mesh, rows) // TOKEN_BLOCK)
    with jax.set_mesh(mesh):
        program = compile_and_analyze(setup.step.lower(setup.abstract_state, batch), {_LOSS_TILES: max(tiles, 1)}, hlo)
    kernels = kernel_flops(model_config, mesh, *_segments(shape), _passed(trained), vars(config.remat))
    work = row * rows
    padded = dataclasses.replace(
        work,
        patches=rows * shape.patches * shape.vision_rows,
        vision_tokens=rows * shape.vision_tokens,
        tokens=rows * shape.length,
    )
    flops = step_flops(model_config, work, trained, config.lora.rank)
    padded_flops = step_flops(model_config, padded, trained, config.lora.rank)
    useful_share = flops["total"] / padded_flops["total"]
    flops["recomputed"] = recomputed_flops(model_config, work, trained, vars(config.remat))
    return Plan(
        topology=topology,
        mesh=dict(mesh.shape),
        remat=dict(vars(config.remat)),
        rows=rows,
        grad_accum_steps=grad_accum_steps(config.batch, mesh, rows),
        tokens=rows * shape.length,
        useful_share=useful_share,
        flops={part: total / topology.chips for part, total in flops.items()},
        kernel_flops={scope: rows * total / topology.chips for scope, total in kernels.items()},
        program=program,
    )


def _row_work(config: RunConfig, shape: BatchShape) -> StepWork:
    """Returns the work of a row as full as those of stage 4."""
    tokens, patches = shape.length * TOKEN_FILL, shape.patches * shape.vision_rows * PATCH_FILL
    merged = patches / (1 if config.data.image_merge == 1 and config.data.prune_threshold is None else 4)
    return StepWork(
        patches=int(patches),
        patch_pairs=int(patches * FRAME_PATCHES),
        vision_tokens=int(min(merged, tokens)),
        tokens=int(tokens),
        token_pairs=int(tokens * shape.length * TOKEN_FILL / SAMPLES_PER_ROW / 2),
        supervised=int(tokens * SUPERVISED),
    )


def _segments(shape: BatchShape) -> tuple[np.ndarray, np.ndarray]:
    """Returns the frame of each patch and the sample of each token in a row as full as stage 4's; 0 = padding."""

    def segments(size: int, filled: float, length: float) -> np.ndarray:
        index = np.arange(size)
        return np.where(index < filled, index // math.ceil(length) + 1, 0).astype(np.int32)

    tokens, patches = shape.length * TOKEN_FILL, shape.patches * shape.vision_rows
    frames = segments(patches, patches * PATCH_FILL, FRAME_PATCHES)
    return frames, segments(shape.length, tokens, tokens / SAMPLES_PER_ROW)


def _passed(trained: list[str]) -> Mapping[str, bool]:
    """Returns whether gradients pass through the layers of tower and decoder."""
    return {"vision": "vision" in trained, "text": bool(trained)}
