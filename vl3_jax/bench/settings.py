"""Settings that all subjects of a benchmark run share, and the machine that it runs on."""

import os
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import jax

from vl3_jax.bench import ROUNDS
from vl3_jax.bench.timing import compiled, copy_bandwidth, matmul_peak
from vl3_jax.model.config import preset
from vl3_jax.versions import version

REDUCED_SIZES = "reduced sizes: no accelerator was found"  # a note of tables
_PACKAGES = ("vl3_jax", "jax", "jaxlib", "libtpu", "flax", "numpy", "torch", "transformers", "av", "pillow")
_NO_OPTIMISATION = {"xla_backend_optimization_level": 0}


class Settings:
    """Sizes, repetitions and the measured peak rates of the machine.

    Attributes:
      model: Preset of the model, whose weights are random.
      config: The model's configuration.
      small: Whether sizes are tiny, to check that everything runs; the figures then mean nothing.
      rounds: Number of measurements of each side.
      dtype: Type of weights and activations.
      accelerator: Whether the device is not a CPU.
      peak_flops: Measured FLOP/s of a large matrix product in `dtype`.
      copy_bytes_per_second: Measured bytes/s of a copy, read and written.
      media: Images and videos to use instead of synthetic ones.
      long: Whether to measure also what takes minutes.
    """

    def __init__(
        self,
        model: str | None = None,
        small: bool = False,
        rounds: int | None = None,
        media: tuple[pathlib.Path, ...] = (),
        long: bool = False,
    ):
        """Makes the settings for this machine and measures its peak rates.

        Args:
          model: A preset; None selects "tiny" for a small run, "mid" on a CPU, "2b" elsewhere.
          small: Whether to use tiny sizes.
          rounds: Number of measurements; None selects `ROUNDS`, or 1 for a small run.
          media: Images and videos to use.
          long: Whether to measure also what takes minutes.
        """
        self.small, self.media, self.long = small, media, long
        self.accelerator = jax.default_backend() != "cpu"
        self.dtype = "bfloat16" if self.accelerator else "float32"
        self.model = model or self.pick("tiny", "mid", "2b")
        self.config = preset(self.model)
        self.rounds = rounds or (1 if small else ROUNDS)
        self.peak_flops = matmul_peak(self.pick(256, 2048, 8192), self.dtype)
        self.copy_bytes_per_second = copy_bandwidth(self.pick(2**20, 2**28, 2**32))

    def compiled(self, function: Callable, *arguments) -> Callable[[], object]:
        """Compiles a side (see `timing.compiled`); small runs are compiled without XLA optimisation."""
        return compiled(function, *arguments, options=_NO_OPTIMISATION if self.small else None)

    def pick(self, small, cpu, accelerator):
        """Returns the argument that belongs to this kind of run."""
        return small if self.small else accelerator if self.accelerator else cpu


def machine() -> dict[str, Any]:
    """Returns device, processor and the versions of the packages whose speed is measured."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: installed for name in _PACKAGES if (installed := version(name))},
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
