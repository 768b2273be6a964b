"""Estimates the device memory that inference needs, from the model's sizes, before anything is loaded."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vl3_jax.model import ModelConfig, abstract_params, num_parameters
from vl3_jax.parallel.topologies import GIB


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Memory needed on one device, in bytes.

    Attributes:
      weights: All parameters.
      cache: Keys and values of every slot.
      activations: Estimated peak: the larger of what the tower and the decoder hold.
      limit: The device's memory, None if it does not report it (a CPU).
    """

    weights: int
    cache: int
    activations: int
    limit: int | None = None

    @property
    def total(self) -> int:
        """Weights, cache and activations together."""
        return self.weights + self.cache + self.activations

    @property
    def fits(self) -> bool:
        """Whether at least a tenth of the device stays free; True if its size is unknown."""
        return self.limit is None or self.total <= 0.9 * self.limit

    def __str__(self) -> str:
        rows = [(name, getattr(self, name)) for name in ("weights", "cache", "activations", "total")]
        if self.limit is not None:
            rows.append(("device", self.limit))
        table = "\n".join(f"{name:12}{size / GIB:8.2f} GiB" for name, size in rows)
        return table if self.fits else f"{table}\ndoes not fit: lower max_visual_tokens, or use a smaller model"


def memory_plan(
    config: ModelConfig, dtype: DTypeLike = jnp.bfloat16, slots: int = 16_384, patches: int = 16_384
) -> MemoryPlan:
    """Plans the memory of one conversation on the first local device.

    Args:
      config: The model's configuration.
      dtype: Type of weights, cache and activations.
      slots: Cache slots: tokens of prompt and answer.
      patches: Patches of all images and frames.
    """
    item_size = jnp.dtype(dtype).itemsize
    vision, text = config.vision, config.text
    qkv_width = (text.num_heads + 2 * text.num_kv_heads) * text.head_dim
    tower = patches * (2 * vision.hidden_size + max(4 * vision.hidden_size, 2 * vision.intermediate_size)) * item_size
    decoder = slots * (2 * text.hidden_size + max(2 * qkv_width, 2 * text.intermediate_size)) * item_size
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return MemoryPlan(
        weights=num_parameters(abstract_params(config)) * item_size,
        cache=text.cached_values_per_token * item_size * slots,
        activations=max(tower, decoder) + 4 * text.vocab_size,
        limit=limit,
    )
