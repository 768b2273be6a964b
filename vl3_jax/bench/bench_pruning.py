"""The frame pruner's mask over a video: one array operation, against loops over frames and blocks."""

import functools

import jax.numpy as jnp
import numpy as np

from vl3_jax.bench.inputs import GREY, build_reference
from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, REFERENCE, Table
from vl3_jax.bench.timing import measure_case
from vl3_jax.processing.diff_pruning import DEFAULT_MIN_TOKENS, DEFAULT_THRESHOLD, keep_mask
from vl3_jax.processing.packed_batch import PATCH_DIM, Visual
from vl3_jax.processing.patchify import normalise
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.pruning import pruning_mask

ON_DEVICE, FROM_BYTES, LOOP = "compiled by JAX", "from uint8 patches", "loop"
_MERGE, _UNCHANGED = 2, 0.5


def measure(settings: Settings) -> Table:
    """Measures a video in which half of the blocks do not change from frame to frame."""
    frames, blocks = settings.pick((6, 8), (180, 84), (180, 84))
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (frames, blocks, _MERGE**2 * PATCH_DIM), np.uint8)
    for frame in range(1, frames):
        unchanged = rng.random(blocks) < _UNCHANGED
        patches[frame, unchanged] = patches[frame - 1, unchanged]
    flat = patches.reshape(-1, PATCH_DIM)
    pixels = normalise(flat, GREY, GREY).reshape(patches.shape)
    video, config = Visual(flat, (frames, _MERGE, _MERGE * blocks), _MERGE), ProcessorConfig()
    sides = {
        OURS: lambda: keep_mask(pixels),
        FROM_BYTES: lambda: pruning_mask(video, DEFAULT_THRESHOLD, config),
        ON_DEVICE: settings.compiled(keep_mask, jnp.asarray(pixels)),
        LOOP: lambda: looped_keep_mask(pixels),
    }
    theirs, notes = build_reference(lambda module: functools.partial(module.compression_mask, pixels, _MERGE))
    if theirs is not None:
        sides[REFERENCE] = theirs
    kept = {side: int(np.sum(np.asarray(run()))) for side, run in sides.items()}
    case = f"{frames} frames of {blocks} blocks"
    rows = measure_case(case, sides, settings.rounds, frames, "frames", figures=lambda side, _: {"kept": kept[side]})
    return Table("pruning", "which vision tokens of a video are kept", rows, notes)


def looped_keep_mask(pixels: np.ndarray) -> np.ndarray:
    """Computes the mask [frames, blocks] block by block."""
    frames, blocks, _ = pixels.shape
    keep = np.ones((frames, blocks), bool)
    for frame in range(1, frames):
        for block in range(blocks):
            change = 255 * np.mean(np.abs(pixels[frame, block] - pixels[frame - 1, block]))
            keep[frame, block] = change > DEFAULT_THRESHOLD
        if keep[frame].sum() < DEFAULT_MIN_TOKENS:
            keep[frame, :DEFAULT_MIN_TOKENS] = True
    return keep
