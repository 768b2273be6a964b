"""A training step on chips that are not there: compiled, weighed, and counted."""

import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict

from data_pipelines import mixtures
from vl3_jax.model import ModelConfig, preset
from vl3_jax.parallel.collectives import Traffic
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.rules import batch_shardings
from vl3_jax.parallel.topologies import Topology
from vl3_jax.planning.compiler import MemoryAnalysis, compile_and_analyze, topology_devices
from vl3_jax.processing.packed_batch import BatchShape, pack
from vl3_jax.training.flops import StepWork, recomputed_flops, step_flops
from vl3_jax.training.rows import check_rows, grad_accum_steps, rows_for_samples
from vl3_jax.training.setup import build_train_setup

# How full rows are, and of what: measured in the proportions of stage 4 (docs/benchmarks.md).
TOKEN_FILL, PATCH_FILL = 0.69, 0.97
SAMPLES_A_ROW, FRAME_PATCHES, SUPERVISED = 2.35, 400, 0.15
_TASKS = 8  # of the loss by task; their number hardly matters
_STEPS = 1000  # of the schedule; likewise


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiler says of a step, and what follows.

    Attributes:
      topology: the slice.
      mesh: its axes.
      remat: policy of the tower and of the decoder.
      rows: of a step.
      grad_accum_steps: microbatches of a step, which run one after another.
      tokens: of a step, padding included.
      flops: of one step on a chip, by part and in all, useful work only; `recomputed` is what remat adds to it.
      weight: HBM and collectives of a chip.
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
        """Bytes left on a chip; negative where it does not fit."""
        return self.topology.chip.hbm - self.memory.peak

    @property
    def useful_seconds(self) -> float:
        """Of a step's arithmetic at the chip's peak, without what is recomputed."""
        return self.flops["total"] / self.topology.chip.flops

    @property
    def link_seconds(self) -> float:
        """Of the traffic of a step's collectives, at the peak of a chip's links."""
        return sum(one.bytes for one in self.memory.collectives.values()) / self.topology.chip.links

    def compute_seconds(self, share: float) -> float:
        """Of a step's arithmetic with what is recomputed, at this share of the chip's peak."""
        return (self.flops["total"] + self.flops["recomputed"]) / self.topology.chip.flops / share

    def speed(self, share: float) -> float:
        """Tokens a second, without padding, where links and arithmetic overlap."""
        return self.tokens * TOKEN_FILL / max(self.compute_seconds(share), self.link_seconds)

    def as_json(self) -> dict[str, Any]:
        """For `vl3 plan --json`, and back with `from_json`."""
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
                "limit": self.topology.chip.hbm,
            },
            "flops_per_chip": self.flops["total"],
            "flops_by_part": self.flops,
            "collectives": {kind: dataclasses.asdict(one) for kind, one in memory.collectives.items()},
            "compile_seconds": memory.seconds,
            "tokens_per_step": self.tokens,
        }


def from_json(found: dict[str, Any], topology: Topology) -> Plan:
    """A plan as `as_json` gave it, of this slice."""
    hbm = found["hbm_bytes_per_chip"]
    traffic = {kind: Traffic(**one) for kind, one in found["collectives"].items()}
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


def plan_step(config: ConfigDict, topology: Topology) -> Plan:
    """Compiles a configuration's step for a slice. Its mesh comes from `config.mesh`, its rows from `config.batch`.

    Raises:
      InputError: no TPU compiler here, or a mesh that does not fit the slice; one line.
    """
    mesh = make_mesh(dict(config.mesh), topology_devices(topology))
    model_config, shape = preset(config.model), mixtures.data_settings(config.data).shape
    rows = config.batch.rows or rows_for_samples(config, mesh, SAMPLES_A_ROW)
    check_rows(config, mesh, rows)
    program = build_train_setup(config, model_config, mesh, rows, _STEPS, _TASKS)
    arrays = {
        name: jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype) for name, array in pack([[]], shape).items()
    }
    placed = batch_shardings(arrays, mesh)
    batch = {name: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=placed[name]) for name, one in arrays.items()}
    with jax.set_mesh(mesh):
        memory, _ = compile_and_analyze(program.step.lower(program.target, batch))
    return Plan(
        topology=topology,
        mesh=dict(mesh.shape),
        remat=dict(config.remat),
        rows=rows,
        grad_accum_steps=grad_accum_steps(config, mesh, rows),
        tokens=rows * shape.length,
        flops=_flops(config, model_config, shape, rows, topology.chips),
        memory=memory,
    )


def _flops(config: ConfigDict, model_config: ModelConfig, shape: BatchShape, rows: int, count: int) -> dict[str, float]:
    """Of each of `count` chips, for rows as full as those of stage 4."""
    tokens = rows * shape.length * TOKEN_FILL
    patches = rows * shape.patches * shape.vision_rows * PATCH_FILL
    merged = patches / (1 if config.data.image_merge == 1 and not config.data.prune_threshold else 4)
    work = StepWork(
        patches=int(patches),
        patch_pairs=int(patches * FRAME_PATCHES),
        vision_tokens=int(min(merged, tokens)),
        tokens=int(tokens),
        token_pairs=int(tokens * shape.length * TOKEN_FILL / SAMPLES_A_ROW / 2),
        supervised=int(tokens * SUPERVISED),
    )
    trained = [group for group, rate in config.optimizer.learning_rates.items() if rate]
    flops = step_flops(model_config, work, trained, config.lora.rank)
    flops["recomputed"] = recomputed_flops(model_config, work, trained, dict(config.remat))
    return {name: all_ / count for name, all_ in flops.items()}
