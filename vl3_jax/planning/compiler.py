"""Ahead-of-time compilation for TPU topologies, on a machine without a TPU."""

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

# "Used 18.50G of 15.75G hbm", after placing buffers; "HLO temporaries (19.21G) exceeds available HBM", before.
_OUT_OF_MEMORY = re.compile(r"(?:[Uu]sed |temporaries \()(?P<size>[\d.]+)(?P<unit>[KMGT])(?: of|\) exceeds)")


@dataclasses.dataclass(frozen=True)
class MemoryAnalysis:
    """The compiler's figures of one program on a chip.

    Attributes:
      fits: Whether the program compiled. Of one that does not fit only `peak` is known.
      arguments, temporaries, peak: Bytes of HBM.
      collectives: Count and bytes of each kind of collective, of one run.
      seconds: Seconds of compilation on this machine.
    """

    fits: bool
    arguments: int
    temporaries: int
    peak: int
    collectives: Mapping[str, Traffic]
    seconds: float


def topology_devices(topology: Topology) -> list[Any]:
    """Returns descriptions of the chips of a topology, as devices of a mesh.

    Raises:
      InputError: No TPU compiler is installed, or it refuses the topology.
    """
    settings: dict[str, Any] = {"num_slices": topology.slices}
    if topology.chip.named_by_cores:
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
      Its figures, and the compiled program; None in its place where it does not fit.
    """
    started = time.perf_counter()
    with quiet():
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            peak = bytes_needed(str(error))
            if peak is None:
                raise
            return MemoryAnalysis(False, 0, 0, peak, {}, time.perf_counter() - started), None
    memory = compiled.memory_analysis()
    analysis = MemoryAnalysis(
        fits=True,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        collectives=collectives(compiled.as_text()),
        seconds=time.perf_counter() - started,
    )
    return analysis, compiled


def bytes_needed(message: str) -> int | None:
    """Returns the bytes that a program would need, from the compiler's error message; None of another error."""
    found = _OUT_OF_MEMORY.search(message)
    return int(float(found["size"]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found["unit"]]) if found else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the compiler's messages about the machine it runs on from the terminal."""
    saved, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(devnull)
