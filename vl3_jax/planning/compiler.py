"""Ahead-of-time compilation for TPU topologies, on a machine without a TPU."""

import contextlib
import dataclasses
import math
import os
import pathlib
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental import topologies

from vl3_jax.errors import InputError
from vl3_jax.parallel.topologies import Topology
from vl3_jax.planning.program_cost import NO_COST, SCOPES, ProgramCost, program_cost

# "Used 18.50G of 15.75G hbm", after placing buffers; "HLO temporaries (19.21G) exceeds available HBM", before.
_OUT_OF_MEMORY = re.compile(r"(?:[Uu]sed |temporaries \()(?P<size>[\d.]+)(?P<unit>[KMGT])(?: of|\) exceeds)")


@dataclasses.dataclass(frozen=True)
class ProgramAnalysis:
    """The compiler's figures of one program on a chip.

    Attributes:
      fits: Whether the program compiled. Of one that does not fit only `peak` is known.
      arguments, temporaries, peak: Bytes of HBM.
      cost: Cycles and collectives of one run.
      seconds: Seconds of compilation on this machine.
    """

    fits: bool
    arguments: int
    temporaries: int
    peak: int
    cost: ProgramCost
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Returns the figures as `vl3 plan --serve --json` prints them."""
        figures = {name: value for name, value in vars(self).items() if name != "cost"}
        return figures | self.cost.as_json()

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "ProgramAnalysis":
        """Returns the figures that `as_json` wrote."""
        names = (field.name for field in dataclasses.fields(cls) if field.name != "cost")
        return cls(**{name: found[name] for name in names}, cost=ProgramCost.from_json(found))


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


def compile_and_analyze(
    lowered: Any,
    unknown_trips: Mapping[str, int] | None = None,
    hlo: pathlib.Path | None = None,
    scopes: Mapping[str, str] = SCOPES,
) -> ProgramAnalysis:
    """Compiles a lowered program and returns its figures.

    Args:
      lowered: The program, from `jax.jit(...).lower(...)`.
      unknown_trips: Trips of loops whose number depends on data, see `Program.runs`.
      hlo: File that the optimised HLO text is written to, unless the program does not fit.
      scopes: Parts of the program whose cycles are told apart.
    """
    started = time.perf_counter()
    with quiet():
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            peak = bytes_needed(str(error))
            if peak is None:
                raise
            return ProgramAnalysis(False, 0, 0, peak, NO_COST, time.perf_counter() - started)
    seconds, memory, text = time.perf_counter() - started, compiled.memory_analysis(), compiled.as_text()
    if hlo:
        hlo.write_text(text)
    return ProgramAnalysis(
        fits=True,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        cost=program_cost(text, unknown_trips, scopes),
        seconds=seconds,
    )


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
