"""The frame pruner's mask over a video: one array operation, against loops over frames and blocks."""

import jax.numpy as jnp
import numpy as np

from vl3_jax.bench import reference
from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import OURS, Row, Table
from vl3_jax.bench.timing import in_turns
from vl3_jax.processing.diff_pruning import DEFAULT_MIN_TOKENS, DEFAULT_THRESHOLD, keep_mask
from vl3_jax.processing.packed_batch import PATCH_DIM
from vl3_jax.processing.patchify import pruning_mask

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
    pixels = reference.normalise(patches)
    flat, grey = patches.reshape(-1, PATCH_DIM), np.full(3, 0.5)
    sides = {
        OURS: lambda: keep_mask(pixels),
        FROM_BYTES: lambda: pruning_mask(flat, frames, _MERGE, DEFAULT_THRESHOLD, DEFAULT_MIN_TOKENS, grey, grey),
        ON_DEVICE: settings.compiled(keep_mask, jnp.asarray(pixels)),
        LOOP: lambda: looped_keep_mask(pixels),
    }
    missing = reference.why_missing()
    if not missing:
        sides[reference.SIDE] = _reference(pixels)
    kept = {side: int(np.sum(np.asarray(run()))) for side, run in sides.items()}
    seconds = in_turns(sides, settings.rounds)
    case = f"{frames} frames of {blocks} blocks"
    rows = [Row(case, side, time, frames, "frames", None, {"kept": kept[side]}) for side, time in seconds.items()]
    return Table("pruning", "which vision tokens of a video are kept", rows, (missing,) if missing else ())


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


def _reference(pixels: np.ndarray):
    import torch
    from transformers.models.video_llama_3.video_processing_video_llama_3 import VideoLlama3VideoProcessor

    frames, blocks, _ = pixels.shape
    flat, merge = torch.tensor(pixels.reshape(-1, PATCH_DIM)), torch.tensor([_MERGE])
    grid = torch.tensor([[frames, _MERGE * blocks, _MERGE]])
    return lambda: VideoLlama3VideoProcessor._get_compression_mask(None, flat, grid, merge).numpy()
