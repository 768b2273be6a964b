"""A training step on devices that are not there: compiled by the real TPU compiler, weighed, and counted."""

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from vl3_jax.errors import InputError
from vl3_jax.parallel.topologies import Topology

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
      rows: of a step.
      fits: the program compiled, so it fits.
      arguments, temporaries, peak, limit: bytes of HBM on a chip, the compiler's own figures; of a program that does
        not fit only `peak` is known.
      collectives: kind -> count and bytes, of one step on a chip.
      flops: of one step on a chip, by part and in all, useful work only.
      tokens: of a step, padding included.
      compile_seconds: on this machine.
    """

    topology: Topology
    mesh: dict[str, int]
    rows: int
    fits: bool
    arguments: int
    temporaries: int
    peak: int
    limit: int
    collectives: dict[str, Any]
    flops: dict[str, float]
    tokens: int
    compile_seconds: float

    @property
    def headroom(self) -> int:
        """Bytes left on a chip; negative where it does not fit."""
        return self.limit - self.peak

    @property
    def seconds(self) -> float:
        """Arithmetic of a step at the chip's peak."""
        return self.flops["total"] / self.topology.chip.flops

    def as_json(self) -> dict[str, Any]:
        """For `vl3 plan --json`."""
        return {
            "topology": self.topology.name,
            "chips": self.topology.chips,
            "mesh": self.mesh,
            "rows": self.rows,
            "fits": self.fits,
            "hbm_bytes_per_chip": {
                "arguments": self.arguments,
                "temporaries": self.temporaries,
                "peak": self.peak,
                "limit": self.limit,
            },
            "flops_per_chip": self.flops["total"],
            "flops_by_part": self.flops,
            "collectives": {kind: dataclasses.asdict(one) for kind, one in self.collectives.items()},
            "compile_seconds": self.compile_seconds,
            "tokens_per_step": self.tokens,
        }


def compile_plan(config: ConfigDict, slice_: Topology) -> Plan:
    """Compiles a configuration's step for a slice. Its mesh comes from `config.mesh`, its rows from `config.batch`.

    Raises:
      InputError: no TPU compiler here, or a mesh that does not fit the slice; one line.
    """
    devices = _devices(slice_)
    import jax

    from data_pipelines import mixtures
    from vl3_jax.model import preset
    from vl3_jax.parallel.collectives import collectives
    from vl3_jax.parallel.mesh import make_mesh
    from vl3_jax.parallel.rules import batch_shardings
    from vl3_jax.processing.packed_batch import pack
    from vl3_jax.training.data import row_parts
    from vl3_jax.training.program import make_program

    mesh = make_mesh(dict(config.mesh), devices)
    sizes, shape = preset(config.model), mixtures.settings_of(config.data).shape
    parts = row_parts(config, mesh, config.batch.rows)
    rows = config.batch.rows or parts
    program = make_program(config, sizes, mesh, _STEPS, _TASKS)
    arrays = {
        name: jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype) for name, array in pack([[]], shape).items()
    }
    placed = batch_shardings(arrays, mesh)
    batch = {name: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=placed[name]) for name, one in arrays.items()}
    flops = _flops(config, sizes, shape, rows, slice_.chips)
    common = {
        "topology": slice_,
        "mesh": dict(mesh.shape),
        "rows": rows,
        "limit": slice_.chip.hbm,
        "flops": flops,
        "tokens": rows * shape.length,
    }
    begin = time.perf_counter()
    with jax.set_mesh(mesh), _quiet():
        try:
            compiled = program.step.lower(program.target, batch).compile()
        except jax.errors.JaxRuntimeError as error:
            peak = bytes_needed(str(error))
            if peak is None:
                raise
            seconds = time.perf_counter() - begin
            return Plan(
                fits=False, arguments=0, temporaries=0, peak=peak, collectives={}, compile_seconds=seconds, **common
            )
    memory = compiled.memory_analysis()
    return Plan(
        fits=True,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        collectives=collectives(compiled.as_text()),
        compile_seconds=time.perf_counter() - begin,
        **common,
    )


def _devices(slice_: Topology) -> list[Any]:
    """Descriptions of the slice's chips."""
    # Off the cloud the compiler must not look for a TPU machine around it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jax.experimental import topologies

    with _quiet():
        try:
            return topologies.get_topology_desc(slice_.name, platform="tpu").devices
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise InputError(
                f"{slice_.name}: the TPU compiler cannot be asked ({text}); pip install 'vl3_jax[plan]', or check the "
                "shape of the slice"
            ) from error


def _flops(config: ConfigDict, sizes, shape, rows: int, chips: int) -> dict[str, float]:
    """Of one chip, for rows as full as those of stage 4."""
    from vl3_jax.training.flops import Work, step_flops

    tokens = rows * shape.length * TOKEN_FILL
    patches = rows * shape.patches * shape.vision_rows * PATCH_FILL
    merged = patches / (1 if config.data.image_merge == 1 and not config.data.prune_threshold else 4)
    work = Work(
        patches=int(patches),
        patch_pairs=int(patches * FRAME_PATCHES),
        vision_tokens=int(min(merged, tokens)),
        tokens=int(tokens),
        token_pairs=int(tokens * shape.length * TOKEN_FILL / SAMPLES_A_ROW / 2),
        supervised=int(tokens * SUPERVISED),
    )
    trained = [group for group, rate in config.optimizer.rates.items() if rate]
    return {name: count / chips for name, count in step_flops(sizes, work, trained, config.lora.rank).items()}


def bytes_needed(message: str) -> int | None:
    """Bytes that a program would need, from the compiler's refusal; None if that was about something else."""
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of", message)
    return int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]]) if found else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the compiler's remarks about the machine it runs on from the terminal."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def rendered(plan: Plan, mfu: float, samples: int = 0) -> str:
    """The plan for a person to read.

    Args:
      plan: see there.
      mfu: assumed for speed and cost.
      samples: of the stage's data; 0 is unknown.
    """
    chips = plan.topology.chips
    axes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one chip"
    lines = [
        f"{plan.topology.name}: {chips} chips, mesh {axes}; a step has {plan.rows} rows, {plan.tokens:,} tokens",
        f"HBM a chip    {_gib(plan.peak)} of {_gib(plan.limit)} GiB: "
        + (
            f"it fits, {_gib(plan.headroom)} to spare (arguments {_gib(plan.arguments)})"
            if plan.fits
            else f"it does not fit, by {_gib(-plan.headroom)}; {_ADVICE}"
        ),
    ]
    for kind, traffic in plan.collectives.items():
        lines.append(f"{kind:20}{traffic.count:7,} a step, {traffic.bytes / 1e9:8.2f} GB a chip")
    parts = ", ".join(f"{name} {flops / 1e12:.1f}" for name, flops in plan.flops.items() if flops and name in _PARTS)
    seconds = plan.seconds / mfu
    lines += [
        f"TFLOP a chip  {plan.flops['total'] / 1e12:.1f} a step ({parts}), in rows as full as stage 4's",
        f"arithmetic    {plan.seconds:.2f} s a step at the peak of {plan.topology.chip.flops / 1e12:.0f} TFLOP/s",
        f"at {mfu:.0%} MFU    {seconds:.2f} s a step, {plan.tokens * TOKEN_FILL / seconds:,.0f} tokens/s",
    ]
    if samples:
        steps = samples / SAMPLES_A_ROW / plan.rows
        hours = steps * seconds / 3600
        lines.append(
            f"{samples:,} samples: about {steps:,.0f} steps, {hours:,.0f} hours, {hours * chips:,.0f} chip-hours"
        )
    lines.append(f"compiled in {plan.compile_seconds:.0f} s")
    return "\n".join(lines)


_PARTS = ("vision", "projector", "llm", "unembed", "lora")
_ADVICE = "try remat.vision and remat.text 'full', fewer rows, mesh.context=2, or a larger slice"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
