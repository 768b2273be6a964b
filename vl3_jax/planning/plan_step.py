"""Plans of a training step: compiled ahead of time for a TPU topology, with its memory, collectives and FLOPs."""

import dataclasses
from typing import Any

import jax

from data_pipelines import mixtures
from vl3_jax.model import ModelConfig, preset
from vl3_jax.parallel.collectives import Traffic
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.rules import batch_shardings
from vl3_jax.parallel.topologies import Topology
from vl3_jax.planning.compiler import MemoryAnalysis, compile_and_analyze, topology_devices
from vl3_jax.processing.packed_batch import BatchShape, pack
from vl3_jax.training.flops import StepWork, recomputed_flops, step_flops
from vl3_jax.training.run_config import RunConfig
from vl3_jax.training.setup import build_train_setup, check_rows, grad_accum_steps, rows_for_samples

# How full rows are, and of what: measured in the proportions of stage 4 (docs/benchmarks.md).
TOKEN_FILL, PATCH_FILL = 0.69, 0.97
SAMPLES_PER_ROW, FRAME_PATCHES, SUPERVISED = 2.35, 400, 0.15
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
      flops: FLOPs of one step on a chip, by part and in total, useful work only; "recomputed" is what remat adds.
      memory: HBM and collectives of a chip.
    """

    topology: Topology
    mesh: dict[str, int]
    remat: dict[str, str]
    rows: int
    grad_accum_steps: int
    tokens: int
    flops: dict[str, float]
    memory: MemoryAnalysis

    @property
    def fits(self) -> bool:
        """Whether the program compiled."""
        return self.memory.fits

    @property
    def headroom(self) -> int:
        """Bytes of HBM left on a chip; negative where the step does not fit."""
        return self.topology.chip.hbm_bytes - self.memory.peak

    @property
    def useful_seconds(self) -> float:
        """Seconds of a step's arithmetic at the chip's peak, without what is recomputed."""
        return self.flops["total"] / self.topology.chip.peak_flops

    @property
    def link_seconds(self) -> float:
        """Seconds of the traffic of a step's collectives at the peak of a chip's links."""
        return sum(traffic.bytes for traffic in self.memory.collectives.values()) / self.topology.chip.link_bandwidth

    def compute_seconds(self, share: float) -> float:
        """Returns the seconds of a step's arithmetic with what is recomputed, at this share of the chip's peak."""
        return (self.flops["total"] + self.flops["recomputed"]) / self.topology.chip.peak_flops / share

    def speed(self, share: float) -> float:
        """Returns tokens per second without padding, if communication and arithmetic overlap."""
        return self.tokens * TOKEN_FILL / max(self.compute_seconds(share), self.link_seconds)

    def as_json(self) -> dict[str, Any]:
        """Returns the plan as `vl3 plan --json` prints it; `from_json` is the inverse."""
        memory = self.memory
        return {
            "topology": self.topology.name,
            "slices": self.topology.slices,
            "chips": self.topology.chips,
            "mesh": self.mesh,
            "remat": self.remat,
            "rows": self.rows,
            "accumulation": self.grad_accum_steps,
            "fits": memory.fits,
            "hbm_bytes_per_chip": {
                "arguments": memory.arguments,
                "temporaries": memory.temporaries,
                "peak": memory.peak,
                "limit": self.topology.chip.hbm_bytes,
            },
            "flops_per_chip": self.flops["total"],
            "flops_by_part": self.flops,
            "collectives": {kind: dataclasses.asdict(traffic) for kind, traffic in memory.collectives.items()},
            "compile_seconds": memory.seconds,
            "tokens_per_step": self.tokens,
        }


def from_json(found: dict[str, Any], topology: Topology) -> Plan:
    """Returns the plan of a topology that `as_json` wrote."""
    hbm = found["hbm_bytes_per_chip"]
    traffic = {kind: Traffic(**values) for kind, values in found["collectives"].items()}
    sizes = (hbm["arguments"], hbm["temporaries"], hbm["peak"])
    memory = MemoryAnalysis(found["fits"], *sizes, traffic, found["compile_seconds"])
    same = {name: found[name] for name in ("mesh", "remat", "rows")}
    return Plan(
        topology,
        **same,
        grad_accum_steps=found["accumulation"],
        tokens=found["tokens_per_step"],
        flops=found["flops_by_part"],
        memory=memory,
    )


def plan_step(config: RunConfig, topology: Topology) -> Plan:
    """Compiles the training step of a configuration for a topology.

    Args:
      config: Configuration of the run; `config.mesh` and `config.batch` decide over mesh and rows.
      topology: TPU slice or slices.

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
    with jax.set_mesh(mesh):
        memory, _ = compile_and_analyze(setup.step.lower(setup.abstract_state, batch))
    return Plan(
        topology=topology,
        mesh=dict(mesh.shape),
        remat=dict(vars(config.remat)),
        rows=rows,
        grad_accum_steps=grad_accum_steps(config.batch, mesh, rows),
        tokens=rows * shape.length,
        flops=_flops(config, model_config, shape, rows, topology.chips),
        memory=memory,
    )


def _flops(config: RunConfig, model_config: ModelConfig, shape: BatchShape, rows: int, count: int) -> dict[str, float]:
    """Returns the FLOPs of each of `count` chips by part, for rows as full as those of stage 4."""
    tokens = rows * shape.length * TOKEN_FILL
    patches = rows * shape.patches * shape.vision_rows * PATCH_FILL
    merged = patches / (1 if config.data.image_merge == 1 and config.data.prune_threshold is None else 4)
    work = StepWork(
        patches=int(patches),
        patch_pairs=int(patches * FRAME_PATCHES),
        vision_tokens=int(min(merged, tokens)),
        tokens=int(tokens),
        token_pairs=int(tokens * shape.length * TOKEN_FILL / SAMPLES_PER_ROW / 2),
        supervised=int(tokens * SUPERVISED),
    )
    trained = [group for group, rate in config.optimizer.learning_rates.items() if rate]
    flops = step_flops(model_config, work, trained, config.lora.rank)
    flops["recomputed"] = recomputed_flops(model_config, work, trained, vars(config.remat))
    return {part: total / count for part, total in flops.items()}
