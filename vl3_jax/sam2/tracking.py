"""Tracking as pure functions: a frame with prompts, and a scan over frames with a memory of fixed size.

Dimension names: F frames, B objects; the others are those of `vl3_jax.sam2.memory_bank`.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, UInt8

from vl3_jax.parallel.rules import current_mesh, mesh_axes, partition_spec
from vl3_jax.sam2.mask_decoder import ABSENT_LOGIT
from vl3_jax.sam2.memory_bank import MEMORY_DTYPE, ConditioningFrames, RecentFrames, memory_tokens
from vl3_jax.sam2.sam2_model import ImageFeatures, ObjectOutput, ObjectPrompts, Sam2, apply, enlarge, mask_logits


class FrameInputs(flax.struct.PyTreeNode):
    """What a step of the scan reads besides the frame itself; in a scan, with a leading dimension F.

    Attributes:
      clock: Clock of the frame, [] int32.
      real: Whether the frame is one of the video and not padding, [] bool.
      corrections: Correction clicks, or `ObjectPrompts.nothing`.
      corrected: Objects that have any, [B] bool.
    """

    clock: Int32[Array, ""]
    real: Bool[Array, ""]
    corrections: ObjectPrompts
    corrected: Bool[Array, " B"]


@functools.partial(jax.jit, static_argnums=0)
def condition(
    model: Sam2,
    params: dict,
    pixels: UInt8[Array, "1 size size 3"],
    prompts: ObjectPrompts,
    masks: Float[Array, "B size size"],
    masked: Bool[Array, " B"],
) -> tuple[Float[Array, "B N m"], ObjectOutput]:
    """Processes a frame in which objects are prompted.

    Args:
      model: The model.
      params: Its parameters.
      pixels: The frame at the size of the input.
      prompts: Points, boxes and vectors.
      masks: Masks of 0 and 1 at the size of the input, for the objects that are `masked` instead.
      masked: Objects whose mask is given, [B] bool.

    Returns:
      Memories of the objects in this frame, and what it shows of them.
    """

    def run(module: Sam2):
        features = module.encode_image(pixels)
        drawn, given = module.condition(features, prompts), module.condition_on_mask(features, masks)
        output = _select(masked, given, drawn)
        full = jnp.where(masked[:, None, None], mask_logits(masks), enlarge(output.mask, module.config.image_size))
        memory = module.remember(features, full, output.presence, jnp.ones_like(masked))
        return memory.astype(MEMORY_DTYPE), output

    return apply(model, params, run)


def track_step(
    module: Sam2,
    features: ImageFeatures,
    conditioning: ConditioningFrames,
    recent: RecentFrames,
    inputs: FrameInputs,
    longest,
) -> tuple[RecentFrames, ObjectOutput]:
    """Finds the objects in one frame, and remembers them.

    In a conditioning frame of an object, what that frame showed of it is the result. An object that has no
    conditioning frame is absent.

    Args:
      module: The bound module.
      features: Features of the frame, F = 1.
      conditioning: Frames with prompts.
      recent: The latest tracked frames.
      inputs: Clock and corrections of the frame.
      longest: Longest distance of a tracked frame whose pointer counts, [] float32.

    Returns:
      The latest tracked frames including this one, and what it shows of the objects.
    """
    memory = memory_tokens(module, conditioning, recent, inputs.clock, longest)
    tracked = module.track(features, memory, inputs.corrections)
    known = conditioning.valid.any(1)
    tracked = tracked.replace(
        mask=jnp.where(known[:, None, None], tracked.mask, ABSENT_LOGIT),
        presence=jnp.where(known, tracked.presence, ABSENT_LOGIT),
    )
    here = conditioning.valid & (conditioning.clock == inputs.clock)
    stored = jax.tree.map(lambda x: jax.vmap(lambda row, slot: row[slot])(x, here.argmax(1)), conditioning.output)
    full = enlarge(tracked.mask, module.config.image_size)
    memory = module.remember(features, full, tracked.presence, inputs.corrected)
    recent = recent.push(memory, tracked.pointer, known & ~here.any(1), inputs.real)
    return recent, _select(here.any(1), stored, tracked)


@functools.partial(jax.jit, static_argnums=0)
def track_frames(
    model: Sam2,
    params: dict,
    pixels: UInt8[Array, "F size size 3"],
    conditioning: ConditioningFrames,
    recent: RecentFrames,
    inputs: FrameInputs,
    longest: Float[Array, ""],
) -> tuple[RecentFrames, ObjectOutput]:
    """Finds objects in consecutive frames: encodes all frames, then scans them.

    A chip encodes one frame after another: an encoder of several takes longer to compile, and longer to run on a TPU,
    which holds the activations of one in its fast memory.

    The arguments and results are those of `track_step`, with a leading dimension F.
    """
    together = _frames_at_once(len(pixels))
    groups = pixels.reshape(-1, together, *pixels.shape[1:])
    positions = apply(model, params, "image_positions")
    features = jax.lax.map(lambda group: apply(model, params, "encode_image", group, positions), groups)
    features = jax.tree.map(lambda x: x.reshape(-1, 1, *x.shape[2:]), features)

    def step(recent, frame):
        one, inputs = frame
        return apply(model, params, track_step, one, conditioning, recent, inputs, longest)

    return jax.lax.scan(step, recent, (features, inputs))


def _frames_at_once(count: int) -> int:
    """Returns how many of some frames the chips of the mesh encode side by side."""
    mesh = current_mesh()
    axes = mesh_axes(partition_spec(("batch",), (count,), mesh)[0]) if mesh else ()
    return math.prod(mesh.shape[axis] for axis in axes) if mesh else 1


def _select(first: Bool[Array, " B"], x: ObjectOutput, y: ObjectOutput) -> ObjectOutput:
    """Returns `x` for the objects that are `first`, and `y` for the others."""
    pick = lambda a, b: jnp.where(first.reshape(-1, *[1] * (a.ndim - 1)), a, b.astype(a.dtype))  # noqa: E731
    return jax.tree.map(pick, x, y)
