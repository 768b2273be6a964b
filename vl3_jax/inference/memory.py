"""The memory that inference needs, counted before anything is loaded, and what to do where there is less."""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from vl3_jax.checkpoint.loading import leaves_to_load
from vl3_jax.checkpoint.sources import CheckpointSource, chat_config
from vl3_jax.checkpoint.tensors import float_dtype
from vl3_jax.errors import InputError
from vl3_jax.host_memory import free_host_memory
from vl3_jax.inference.buckets import LARGEST_PART
from vl3_jax.model.config import ModelConfig
from vl3_jax.storage.progress import human_bytes

_NARROW = "bfloat16"  # the narrower of the types of activations
FEWEST_TOKENS = 256  # vision tokens below which a smaller limit is not advised
PATCHES_PER_TOKEN = 4  # of a video


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes that inference needs on one device.

    Attributes:
      weights: All parameters in the types that they are loaded in.
      loading: What loading needs besides them: the largest part that is read at a time.
      cache: Keys and values of every slot.
      activations: Estimated peak: the larger of what the tower and the decoder hold.
      free: Bytes that the device has left, and on a CPU the machine; None if it does not report them.
    """

    weights: int
    loading: int
    cache: int
    activations: int
    free: int | None = None

    @property
    def total(self) -> int:
        """The most that is needed at a time."""
        return self.weights + max(self.loading, self.cache + self.activations)

    @property
    def fits(self) -> bool:
        """Whether there is as much; True if that is unknown."""
        return self.free is None or self.total <= self.free

    def __str__(self) -> str:
        rows = [(name, getattr(self, name)) for name in ("weights", "loading", "cache", "activations", "total", "free")]
        table = "\n".join(f"{name:12}{human_bytes(size):>10}" for name, size in rows if size is not None)
        return table if self.fits else f"{table}\ndoes not fit: lower max_visual_tokens, or use a smaller model"


@dataclasses.dataclass(frozen=True)
class Demand:
    """What a model is to be loaded as, and asked at once.

    Attributes:
      dtype: Type of the weights that are not quantised, of activations, and of a cache that is not int8.
      quantize: "int8" or None.
      kv_cache: "int8", or None for `dtype`.
      rows: Conversations side by side.
      slots: Tokens of prompt and answer of each.
      patches: Patches of the images and frames of each.
    """

    dtype: str
    quantize: str | None = None
    kv_cache: str | None = None
    rows: int = 1
    slots: int = 1024
    patches: int = 1024


def memory_plan(source: CheckpointSource, demand: Demand, free: int | None = None, shards: int = 1) -> MemoryPlan:
    """Counts the memory that a checkpoint needs for inference.

    Args:
      source: The opened checkpoint.
      demand: How it is loaded, and for what.
      free: Bytes that there are; None asks the first local device, or on a CPU the machine.
      shards: Devices that weights and cache are split over.
    """
    device, dtype = jax.local_devices()[0], float_dtype(demand.dtype)
    leaves = leaves_to_load(source, dtype, serving=True, quantize=demand.quantize)
    is_cpu = device.platform == "cpu"  # elsewhere slices are in the memory of the host
    cache, activations = _cache_and_activations(chat_config(source), demand)
    return MemoryPlan(
        weights=sum(leaf.nbytes for leaf in leaves) // shards,
        loading=max(leaf.largest_slice(source) for leaf in leaves) if is_cpu else 0,
        cache=cache // shards,
        activations=activations,
        free=free_memory() if free is None else free,
    )


def weight_shards(mesh: jax.sharding.Mesh | None) -> int:
    """Returns how many devices of a mesh the weights are split over; each has its own where they share no memory."""
    sizes = {} if mesh is None or jax.default_backend() == "cpu" else mesh.shape
    return sizes.get("fsdp", 1) * sizes.get("tensor", 1)


def free_memory() -> int | None:
    """Returns the bytes that the first local device has left, on a CPU the machine; None if it does not tell."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return free_host_memory()
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def _cache_and_activations(config: ModelConfig, demand: Demand) -> tuple[int, int]:
    vision, text, item_size = config.vision, config.text, jnp.dtype(demand.dtype).itemsize
    qkv_width = (text.num_heads + 2 * text.num_kv_heads) * text.head_dim
    tower = 2 * vision.hidden_size + max(4 * vision.hidden_size, 2 * vision.intermediate_size)
    decoder = 2 * text.hidden_size + max(2 * qkv_width, 2 * text.intermediate_size)
    tokens = min(demand.slots, LARGEST_PART)
    activations = max(demand.patches * tower, tokens * decoder) * item_size + 4 * demand.rows * text.vocab_size
    # An int8 cache has a float32 scale for each head of a token.
    value_size = 1 + 4 / text.head_dim if demand.kv_cache else item_size
    return int(text.cached_values_per_token * value_size) * demand.slots * demand.rows, activations


@dataclasses.dataclass(frozen=True)
class ModelMemory:
    """The memory of one model: refuses what does not fit, in one line with the smallest change that does.

    Attributes:
      source: Its checkpoint.
      demand: How it is loaded; its sizes are those of a short question.
      shards: Devices that weights and cache are split over.
    """

    source: CheckpointSource
    demand: Demand
    shards: int = 1

    def check_loading(self) -> None:
        """Raises InputError if the model, with a short question, needs more memory than there is."""
        plan = memory_plan(self.source, self.demand, shards=self.shards)
        if not plan.fits:
            raise self._refusal(self.demand, plan)

    def check_room(self, rows: int, slots: int) -> None:
        """Raises InputError if the loaded model has no room for a new cache of so many rows and slots."""
        demand, free = dataclasses.replace(self.demand, rows=rows, slots=slots), free_memory()
        plan = memory_plan(self.source, demand, free, self.shards)
        if free is not None and plan.cache + plan.activations > free:
            raise self._refusal(demand, dataclasses.replace(plan, free=free + plan.weights))

    def explained(self, error: BaseException, rows: int | None = None, slots: int | None = None) -> BaseException:
        """Returns an InputError in place of an error that says that memory is exhausted, and other errors as they are.

        Args:
          error: An exception of Python or of a device's allocator.
          rows, slots: Sizes of the cache, if the model is loaded.
        """
        if not is_out_of_memory(error):
            return error
        demand, free = self.demand, free_memory()
        if rows and slots:
            demand = dataclasses.replace(demand, rows=rows, slots=slots)
        plan = memory_plan(self.source, demand, free, self.shards)
        if rows and slots and free is not None:  # the weights are loaded
            plan = dataclasses.replace(plan, free=free + plan.weights)
        return self._refusal(demand, plan)

    def _refusal(self, demand: Demand, plan: MemoryPlan) -> InputError:
        needs = f"needs {human_bytes(plan.total)} of memory (weights {human_bytes(plan.weights)}"
        needs += f", {demand.rows} x {demand.slots:,} tokens {human_bytes(plan.cache + plan.activations)})"
        if plan.free is not None:
            needs += f" and {human_bytes(plan.free)} are free"
        least = plan
        for change, changed in changes(demand):
            least = memory_plan(self.source, changed, plan.free, self.shards)
            if least.total < plan.total and least.fits:
                return InputError(f"{self.source.location}: {needs}; {change} ({human_bytes(least.total)})")
        advice = f"the least is {human_bytes(least.total)}: use a smaller model or more memory"
        return InputError(f"{self.source.location}: {needs}; {advice}")


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an exception of Python or of a device's allocator says that memory is exhausted."""
    device = isinstance(error, jax.errors.JaxRuntimeError) and re.search(
        "RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)
    )
    return isinstance(error, MemoryError) or bool(device)


def changes(demand: Demand) -> Iterator[tuple[str, Demand]]:
    """Yields changes that need less memory, the smallest first, each with a phrase that tells it."""
    tokens = demand.patches // PATCHES_PER_TOKEN
    limits = [tokens // 2**power for power in range(1, 16) if tokens // 2**power >= FEWEST_TOKENS]
    fewer_tokens: list[tuple[str | None, dict[str, Any]]] = [
        (
            f"--max-visual-tokens {limit}",
            {"patches": PATCHES_PER_TOKEN * limit, "slots": max(demand.slots - tokens + limit, limit)},
        )
        for limit in limits
    ]
    rows = [demand.rows // 2**power for power in range(1, 10) if demand.rows // 2**power]
    fewer_rows = [(f"{count} rows at a time", {"rows": count}) for count in rows]
    types: list[tuple[str | None, dict[str, Any]]] = [(None, {})]
    if demand.dtype == "float32":
        types.append((f"--dtype {_NARROW}", {"dtype": _NARROW}))
    if demand.quantize is None:
        types.append(("--quantize int8", {"quantize": "int8"}))
    if len(types) == 3:
        types.append((f"--dtype {_NARROW} --quantize int8", {"dtype": _NARROW, "quantize": "int8"}))
    caches: list[tuple[str | None, dict[str, Any]]] = [(None, {})]
    if demand.kv_cache is None:
        caches.append(("--kv-cache int8", {"kv_cache": "int8"}))
    sizes = [
        (None, {}),
        *fewer_tokens,
        *fewer_rows,
        *itertools.starmap(_both, itertools.product(fewer_tokens, fewer_rows)),
    ]
    for kind, cache, size in itertools.product(types, caches, sizes):
        phrase, fields = _both(_both(kind, cache), size)
        if phrase:
            yield f"use {phrase}", dataclasses.replace(demand, **fields)


def _both(first: tuple[str | None, dict], second: tuple[str | None, dict]) -> tuple[str | None, dict]:
    phrases = [phrase for phrase, _ in (first, second) if phrase]
    return " and ".join(phrases) or None, first[1] | second[1]
