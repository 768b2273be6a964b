"""What a run of the benchmarks has in common."""

import dataclasses
from collections.abc import Callable

import jax

from vl3_jax.bench.timing import compiled, copy_bandwidth, matmul_peak
from vl3_jax.model.config import ModelConfig, preset

_IN_HASTE = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How large, how often, on what.

    Attributes:
      model: name of the model's sizes; its weights are random.
      small: tiny sizes, to see that everything runs; the figures mean nothing.
      rounds: how often each side is measured.
      dtype: of weights and activations.
      accelerator: whether this is no CPU.
      peak: FLOP/s of a large matrix product in `dtype`, measured.
      bandwidth: bytes/s of a copy, reading and writing, measured.
    """

    model: str
    small: bool
    rounds: int
    dtype: str
    accelerator: bool
    peak: float
    bandwidth: float

    @property
    def config(self) -> ModelConfig:
        """Sizes of the model."""
        return preset(self.model)

    def compiled(self, function: Callable, *arguments) -> Callable[[], object]:
        """See `timing.compiled`; tiny sizes run for moments and are compiled in haste."""
        return compiled(function, *arguments, options=_IN_HASTE if self.small else None)

    def pick(self, small, cpu, accelerator):
        """A size for this run."""
        return small if self.small else accelerator if self.accelerator else cpu


def make_settings(model: str | None, small: bool, rounds: int | None) -> Settings:
    """Settings for this machine; measures its peak rates.

    Args:
      model: None takes "tiny" for a small run, "mid" on a CPU, "2b" elsewhere.
      small: see `Settings`.
      rounds: None takes 5, for a small run 1.
    """
    accelerator = jax.default_backend() != "cpu"
    dtype = "bfloat16" if accelerator else "float32"
    return Settings(
        model=model or ("tiny" if small else "2b" if accelerator else "mid"),
        small=small,
        rounds=rounds or (1 if small else 5),
        dtype=dtype,
        accelerator=accelerator,
        peak=matmul_peak(256 if small else 8192 if accelerator else 2048, dtype),
        bandwidth=copy_bandwidth(2**20 if small else 2**32 if accelerator else 2**28),
    )
