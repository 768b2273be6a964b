"""Plans of tracking: the programs of SAM-2 compiled ahead of time for a TPU topology, with weights and memory bank."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from vl3_jax.config_tree import LIMITS, CheckedSettings, Limits
from vl3_jax.errors import InputError
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.rules import shardings
from vl3_jax.parallel.topologies import GIB, Topology
from vl3_jax.planning import report
from vl3_jax.planning.compiler import ProgramAnalysis, compile_and_analyze, topology_devices
from vl3_jax.planning.plan_serving import bytes_per_chip
from vl3_jax.planning.plan_step import KERNEL_SHARE
from vl3_jax.planning.tracking_work import KernelWork, encoder_flops, encoder_kernel_work, memory_kernel_work
from vl3_jax.sam2.memory_bank import MEMORY_DTYPE, ConditioningFrames, RecentFrames
from vl3_jax.sam2.sam2_config import RGB, SIZES, Sam2Config, sam2_preset
from vl3_jax.sam2.sam2_model import ObjectOutput, ObjectPrompts, Sam2, abstract_sam2, sam2_axes
from vl3_jax.sam2.tracking import FrameInputs, condition, track_frames

_DTYPE = jnp.bfloat16
# Parts of the programs, by an expression that the operations' paths contain.
SCOPES: Mapping[str, str] = {
    "image encoder": r"/(trunk|neck)/",
    "memory attention": r"/memory_attention/",
    "mask decoder": r"/mask_decoder/",
    "memory encoder": r"/memory_encoder/",
}


@dataclasses.dataclass(frozen=True)
class TrackingWorkload(CheckedSettings):
    """What is tracked at once.

    Attributes:
      objects: Number of objects, which are tracked side by side.
      prompted: Conditioning frames of each object.
      chunk: Frames that one call of the program tracks.
    """

    objects: int = dataclasses.field(default=1, metadata={LIMITS: Limits(1, 1024)})
    prompted: int = dataclasses.field(default=1, metadata={LIMITS: Limits(1, 1024)})
    chunk: int = dataclasses.field(default=8, metadata={LIMITS: Limits(1, 1024)})


@dataclasses.dataclass(frozen=True)
class TrackingPlan:
    """The figures of tracking on a topology.

    Attributes:
      topology: TPU slice or slices.
      mesh: Size of each mesh axis.
      model: Name of the model.
      workload: What is tracked at once.
      weights, bank: Bytes on a chip: of the parameters, and of what is remembered of all objects.
      encoder_flops: FLOPs of the products of the image encoder for a frame.
      kernels: FLOPs of the kernels that multiply, for a frame.
      programs: The compiler's figures of "condition", a frame with prompts, and "track", a chunk of frames.
    """

    topology: Topology
    mesh: dict[str, int]
    model: str
    workload: TrackingWorkload
    weights: int
    bank: int
    encoder_flops: int
    kernels: KernelWork
    programs: dict[str, ProgramAnalysis]

    @property
    def fits(self) -> bool:
        """Whether every program compiled."""
        return all(program.fits for program in self.programs.values())

    @property
    def peak(self) -> int:
        """Bytes of HBM on a chip that the largest program needs."""
        return max(program.peak for program in self.programs.values())

    @property
    def cycles(self) -> dict[str, int]:
        """The compiler's cycles of a tracked frame by part of the model, kernels not included."""
        return {scope: count // self.workload.chunk for scope, count in self.programs["track"].cost.cycles.items()}

    @property
    def encoder_cycles(self) -> float:
        """Cycles in which the matrix units could multiply what the image encoder does for a frame."""
        return self.encoder_flops / self.topology.chip.peak_flops * self.topology.chip.clock

    @property
    def seconds(self) -> float:
        """Predicted seconds of a tracked frame: the compiler's cycles, then the kernels."""
        chip = self.topology.chip
        moved = self.programs["track"].cost.kernel_bytes / self.workload.chunk / chip.hbm_bandwidth
        return sum(self.cycles.values()) / chip.clock + self.kernels.executed / chip.peak_flops / KERNEL_SHARE + moved

    def as_json(self) -> dict[str, Any]:
        """Returns the plan as `vl3 plan --track --json` prints it."""
        return {
            "topology": self.topology.name,
            "chips": self.topology.chips,
            "mesh": self.mesh,
            "model": self.model,
            **dataclasses.asdict(self.workload),
            "fits": self.fits,
            "hbm_bytes_per_chip": {
                "weights": self.weights,
                "bank": self.bank,
                "peak": self.peak,
                "limit": self.topology.chip.hbm_bytes,
            },
            "programs": {name: program.as_json() for name, program in self.programs.items()},
            "frame": {
                "cycles": {"total": sum(self.cycles.values()), **self.cycles},
                "encoder_flops": self.encoder_flops,
                "encoder_cycles": self.encoder_cycles,
                "kernel_flops": self.kernels._asdict(),
                "predicted_seconds": self.seconds,
            },
        }

    def __str__(self) -> str:
        chip, workload = self.topology.chip, self.workload
        verdict = "it fits" if self.fits else "it does not fit: fewer objects, a smaller chunk or model"
        lines = [
            f"{self.topology.name}: {self.topology.chips} chips, mesh {report.axes(self.mesh)}; {self.model}, "
            f"{workload.objects} objects with {workload.prompted} prompted frames each, chunks of {workload.chunk}",
            f"HBM a chip    {self.peak / GIB:.2f} of {chip.hbm_bytes / GIB:.2f} GiB: {verdict}",
            f"  weights     {self.weights / GIB:6.2f} GiB",
            f"  memory bank {self.bank / GIB:6.2f} GiB",
        ]
        lines += [f"  {name:10}{program.peak / GIB:8.2f} GiB at its peak" for name, program in self.programs.items()]
        if self.fits:
            parts = ", ".join(f"{scope} {count / 1e6:.1f}" for scope, count in self.cycles.items())
            useful = self.kernels.useful / self.kernels.executed
            lines += [
                f"Mcycles       {sum(self.cycles.values()) / 1e6:.1f} a frame ({parts}), kernels not included; "
                f"{self.encoder_cycles / 1e6:.1f} are the image encoder's products",
                f"kernels       {self.kernels.executed / 1e12:.2f} TFLOP a frame, {useful:.0%} of them useful",
                f"predicted     {1 / self.seconds:.1f} frames/s",
            ]
        lines.append(f"compiled in {sum(program.seconds for program in self.programs.values()):.0f} s")
        return "\n".join(lines)


def tracked_model(name: str) -> Sam2Config:
    """Returns the configuration of a released model by its name, such as "2.1-large".

    Raises:
      InputError: There is no such model.
    """
    version, _, size = name.partition("-")
    try:
        return sam2_preset(size, version)
    except ValueError:
        known = ", ".join(f"2.1-{size}" for size in SIZES)
        raise InputError(f"--track {name!r}: no such SAM-2; give {known}, or 2.0 of these sizes") from None


def plan_tracking(
    model: str,
    topology: Topology,
    workload: TrackingWorkload,
    hlo: pathlib.Path | None = None,
) -> TrackingPlan:
    """Compiles the programs of tracking in bfloat16 for a topology, over whose chips the weights are split.

    Args:
      model: Version and size, such as "2.1-large".
      topology: TPU slice or slices.
      workload: What is tracked at once.
      hlo: Folder that the optimised HLO text of each program is written to, as condition.hlo and track.hlo.

    Raises:
      InputError: No TPU compiler is installed, or the model is unknown.
    """
    config = tracked_model(model)
    device_mesh = make_mesh({"fsdp": topology.chips}, topology_devices(topology))
    split = shardings(abstract_sam2(config), sam2_axes(config), device_mesh)
    params = jax.tree.map(_described, abstract_sam2(config, _DTYPE), split)
    whole = functools.partial(jax.tree.map, lambda leaf: _described(leaf, NamedSharding(device_mesh, PartitionSpec())))
    bank = whole(_bank(config, workload))

    def analyze(name: str, function: Callable, *arguments: Any) -> ProgramAnalysis:
        with jax.set_mesh(device_mesh):
            lowered = function.lower(Sam2(config, dtype=_DTYPE), params, *whole(arguments))
            return compile_and_analyze(lowered, hlo=hlo and hlo / f"{name}.hlo", scopes=SCOPES)

    programs = {
        "condition": analyze("condition", condition, *_prompted_frame(config, workload)),
        "track": analyze("track", track_frames, *_frames(config, workload, bank)),
    }
    objects = memory_kernel_work(config, device_mesh, workload.prompted) * workload.objects
    return TrackingPlan(
        topology=topology,
        mesh=dict(device_mesh.shape),
        model=model,
        workload=workload,
        weights=bytes_per_chip(params),
        bank=bytes_per_chip(bank),
        encoder_flops=encoder_flops(config),
        kernels=encoder_kernel_work(config, device_mesh) + objects,
        programs=programs,
    )


def _described(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _array(*shape: int, dtype: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _bank(config: Sam2Config, workload: TrackingWorkload) -> tuple[ConditioningFrames, RecentFrames]:
    """Returns what is remembered of all objects."""
    lead = workload.objects, workload.prompted
    output = ObjectOutput(
        mask=_array(*lead, config.mask_size, config.mask_size),
        score=_array(*lead),
        presence=_array(*lead),
        pointer=_array(*lead, config.width, dtype=_DTYPE),
    )
    memory = _array(*lead, config.grid**2, config.memory_width, dtype=MEMORY_DTYPE)
    conditioning = ConditioningFrames(memory, output, _array(*lead, dtype=jnp.int32), _array(*lead, dtype=jnp.bool))
    return conditioning, jax.eval_shape(lambda: RecentFrames.empty(config, workload.objects, _DTYPE))


def _prompted_frame(config: Sam2Config, workload: TrackingWorkload) -> tuple:
    """Returns the arguments of `condition` for objects of a click each."""
    objects, size = workload.objects, config.image_size
    prompts = jax.eval_shape(lambda: ObjectPrompts.nothing(objects, True))
    masks, masked = _array(objects, size, size), _array(objects, dtype=jnp.bool)
    return _array(1, size, size, RGB, dtype=jnp.uint8), prompts, masks, masked


def _frames(config: Sam2Config, workload: TrackingWorkload, bank: tuple[ConditioningFrames, RecentFrames]) -> tuple:
    """Returns the arguments of `track_frames` without corrections."""
    chunk, objects, size = workload.chunk, workload.objects, config.image_size

    def inputs() -> FrameInputs:
        nothing = jax.tree.map(lambda x: jnp.stack([x] * chunk), ObjectPrompts.nothing(objects, True))
        clock, real = jnp.zeros(chunk, jnp.int32), jnp.ones(chunk, bool)
        return FrameInputs(clock, real, nothing, jnp.zeros((chunk, objects), bool))

    return _array(chunk, size, size, RGB, dtype=jnp.uint8), *bank, jax.eval_shape(inputs), _array()
