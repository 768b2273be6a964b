"""The real TPU compiler without a TPU: descriptions of a slice's chips, and what it says of a program."""

import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental import topologies

from vl3_jax.errors import InputError
from vl3_jax.parallel.collectives import Traffic, collectives
from vl3_jax.parallel.topologies import Topology

GIB = 2**30
# "Used 18.50G of 15.75G hbm", after placing buffers; "HLO temporaries (19.21G) exceeds available HBM", before.
_REFUSAL = re.compile(r"(?:[Uu]sed |temporaries \()(?P<size>[\d.]+)(?P<unit>[KMGT])(?: of|\) exceeds)")


@dataclasses.dataclass(frozen=True)
class MemoryAnalysis:
    """What one program takes of a chip, the compiler's own figures.

    Attributes:
      fits: it compiled. Of a program that does not fit only `peak` is known.
      arguments, temporaries, peak: bytes of HBM.
      collectives: kind -> count and bytes, of one run.
      seconds: of compiling, on this machine.
    """

    fits: bool
    arguments: int
    temporaries: int
    peak: int
    collectives: Mapping[str, Traffic]
    seconds: float


def topology_devices(topology: Topology) -> list[Any]:
    """Descriptions of the slice's chips, as devices of a mesh. InputError if there is no TPU compiler here."""
    settings: dict[str, Any] = {"num_slices": topology.slices}
    if topology.chip.cores_in_names:
        settings["chip_config_name"] = "megacore"  # both cores of a chip are one device, as on the machines
    if math.prod(topology.shape) == 1:
        settings["chips_per_host_bounds"] = (1, 1, 1)
    with quiet():
        try:
            return topologies.get_topology_desc(topology.name, platform="tpu", **settings).devices
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise InputError(
                f"{topology.name}: the TPU compiler cannot be asked ({text}); pip install 'vl3_jax[plan]', or check "
                "the shape of the slice"
            ) from error


def compile_and_analyze(lowered: Any) -> tuple[MemoryAnalysis, Any]:
    """Compiles a lowered program.

    Returns:
      What it takes, and the compiled program; None in its place where it does not fit.
    """
    begin = time.perf_counter()
    with quiet():
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            peak = bytes_needed(str(error))
            if peak is None:
                raise
            return MemoryAnalysis(False, 0, 0, peak, {}, time.perf_counter() - begin), None
    memory = compiled.memory_analysis()
    weight = MemoryAnalysis(
        fits=True,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        collectives=collectives(compiled.as_text()),
        seconds=time.perf_counter() - begin,
    )
    return weight, compiled


def bytes_needed(message: str) -> int | None:
    """Bytes that a program would need, from the compiler's refusal; None if that was about something else."""
    found = _REFUSAL.search(message)
    return int(float(found["size"]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found["unit"]]) if found else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the compiler's remarks about the machine it runs on from the terminal."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
