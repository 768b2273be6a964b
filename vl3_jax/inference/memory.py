"""What inference will need of a device's memory, reckoned from the sizes before anything is loaded."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from vl3_jax.model import ModelConfig

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device.

    Attributes:
      weights: all parameters.
      cache: keys and values of every slot.
      activations: the larger of what the tower and the decoder hold at once, an estimate.
      limit: what the device has; None where it does not say (a CPU).
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
        """Whether a tenth of the device stays free; True where its size is unknown."""
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
    """Plans one conversation on the first local device.

    Args:
      config: sizes of the model.
      dtype: of weights, cache and activations.
      slots: tokens of prompt and answer.
      patches: of all pictures and frames.
    """
    import jax

    size = jnp.dtype(dtype).itemsize
    vision, text = config.vision, config.text
    query_width = (text.num_heads + 2 * text.num_kv_heads) * text.head_dim
    tower = patches * (2 * vision.hidden_size + max(4 * vision.hidden_size, 2 * vision.intermediate_size)) * size
    decoder = slots * (2 * text.hidden_size + max(2 * query_width, 2 * text.intermediate_size)) * size
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return MemoryPlan(
        weights=config.num_parameters * size,
        cache=text.cache_bytes_per_token // 2 * size * slots,
        activations=max(tower, decoder) + 4 * text.vocab_size,
        limit=limit,
    )
