"""What is remembered of objects, as arrays of fixed sizes: frames with prompts, and the latest tracked frames.

Dimension names: B objects, K conditioning frames, R latest memories, Q latest pointers, N cells of the stride-16 map, m
memory width, D width. Frames are numbered by a clock that always runs forwards: where a video is tracked backwards, the
clock is the negative index.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from vl3_jax.kernels.segment_info import round_up
from vl3_jax.parallel.rules import constrain_row_major
from vl3_jax.sam2.memory_attention import MemoryTokens
from vl3_jax.sam2.sam2_config import Sam2Config
from vl3_jax.sam2.sam2_model import ObjectOutput, Sam2

MEMORY_DTYPE = jnp.bfloat16  # of stored memories, as in the original
# Tokens: what is longer than _LONG is padded to whole blocks, so that no kernel needs a padded copy of it.
_BLOCK, _LONG = 512, 8192


class ConditioningFrames(flax.struct.PyTreeNode):
    """Frames in which objects were prompted; all of them are remembered, future ones too.

    Attributes:
      memory: Memories, [B, K, N, m].
      output: What the frames show of the objects, [B, K, ...].
      clock: Clock of each frame, [B, K] int32.
      valid: Slots in use, [B, K] bool; the others may hold any finite values.
    """

    memory: Float[Array, "B K N m"]
    output: ObjectOutput
    clock: Int32[Array, "B K"]
    valid: Bool[Array, "B K"]


class RecentFrames(flax.struct.PyTreeNode):
    """The latest frames in which objects were tracked; pointers of the last one come first.

    Attributes:
      memory: Memories, [B, R, N, m]; one after another, a new one takes the place of the oldest.
      pointer: Object pointers, [B, Q, D].
      valid: Frames that were tracked, [B, Q] bool; the others may hold any finite values.
      count: Number of frames so far, [B] int32; the largest of all objects holds for those that came later.
    """

    memory: Float[Array, "B R N m"]
    pointer: Float[Array, "B Q D"]
    valid: Bool[Array, "B Q"]
    count: Int32[Array, " B"]

    @classmethod
    def empty(cls, config: Sam2Config, objects: int, dtype: DTypeLike = jnp.float32) -> "RecentFrames":
        """Returns the memory of objects that were not tracked yet; `dtype` is that of the pointers."""
        memories, pointers = config.num_memories - 1, config.num_pointers - 1
        return cls(
            jnp.zeros((objects, memories, config.grid**2, config.memory_width), MEMORY_DTYPE),
            jnp.zeros((objects, pointers, config.width), dtype),
            jnp.zeros((objects, pointers), bool),
            jnp.zeros(objects, jnp.int32),
        )

    @property
    def ages(self) -> Int32[Array, " R"]:
        """Frames between the last frame and the one that each memory is of."""
        slots = self.memory.shape[1]
        return (self.count.max() - 1 - jnp.arange(slots)) % slots

    def push(
        self,
        memory: Float[Array, "B N m"],
        pointer: Float[Array, "B D"],
        valid: Bool[Array, " B"],
        real: Bool[Array, ""] | bool = True,
    ) -> "RecentFrames":
        """Returns the memory after one more frame, without the oldest; the same if that is not `real`."""
        count, keep = self.count.max(), lambda new, old: jnp.where(real, new.astype(old.dtype), old)
        shift = lambda old, new: keep(jnp.concatenate([new[:, None], old[:, :-1]], axis=1), old)  # noqa: E731
        # The memories stay where they are: to move them takes longer than to write one.
        slot = count % self.memory.shape[1]
        old = jax.lax.dynamic_index_in_dim(self.memory, slot, 1, keepdims=False)
        memories = jax.lax.dynamic_update_index_in_dim(self.memory, keep(memory, old), slot, 1)
        memories = constrain_row_major(memories, "batch", None, None, None)
        count = jnp.full_like(self.count, count + jnp.asarray(real))
        return RecentFrames(memories, shift(self.pointer, pointer), shift(self.valid, valid), count)


def memory_tokens(
    module: Sam2,
    conditioning: ConditioningFrames,
    recent: RecentFrames,
    clock: Int32[Array, ""],
    longest: Float[Array, ""],
) -> MemoryTokens:
    """Gathers what the features of a frame attend to.

    Args:
      module: The bound module.
      conditioning: Frames with prompts. Their memories always count, their pointers only if the frame is not later.
      recent: The latest tracked frames.
      clock: Clock of the frame.
      longest: Longest distance of a tracked frame whose pointer counts; it is also the unit of distances.

    Returns:
      Tokens of all slots, K + R memory maps and K + Q pointers, of which those in use are valid, and padding.
    """
    config, (rows, slots) = module.config, conditioning.valid.shape
    cells, times = module.memory_positions()
    times = jnp.concatenate([jnp.broadcast_to(times[-1], (slots, times.shape[1])), times[recent.ages]])
    maps_valid = jnp.concatenate([conditioning.valid, recent.valid[:, recent.ages]], axis=1)

    pointers = jnp.concatenate([conditioning.output.pointer, recent.pointer], axis=1).astype(module.dtype)
    ages = jnp.broadcast_to(1 + jnp.arange(recent.pointer.shape[1]), recent.valid.shape)
    past, near = conditioning.valid & (conditioning.clock <= clock), recent.valid & (ages <= longest)
    distances = jnp.concatenate([clock - conditioning.clock, ages], axis=1).astype(jnp.float32)
    pointer_positions = module.pointer_positions(distances, jnp.maximum(longest, 1.0))
    pieces = config.tokens_per_pointer

    flat = lambda x: x.reshape(rows, -1, config.memory_width)  # noqa: E731
    valid = [
        jnp.repeat(maps_valid, cells.shape[0], axis=1),
        jnp.repeat(jnp.concatenate([past, near], 1), pieces, axis=1),
    ]
    count = sum(part.shape[1] for part in valid)
    missing = padded_tokens(count) - count
    padding = jnp.zeros((rows, missing, config.memory_width), module.dtype)
    tokens = (flat(x).astype(module.dtype) for x in (conditioning.memory, recent.memory, pointers))
    return MemoryTokens(
        jnp.concatenate([*tokens, padding], axis=1),
        cells + times[:, None],
        jnp.concatenate([jnp.repeat(pointer_positions, pieces, axis=1), padding], axis=1),
        jnp.concatenate([*valid, jnp.zeros((rows, missing), bool)], axis=1),
    )


def padded_tokens(count: int) -> int:
    """Returns how many tokens a number of them is padded to."""
    return round_up(count, _BLOCK) if count > _LONG else count
