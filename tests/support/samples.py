"""Random samples with images and videos for tests."""

import numpy as np

from vl3_jax.processing.diff_pruning import keep_mask
from vl3_jax.processing.packed_batch import PATCH_DIM, BatchShape, Sample, Visual

TEXT_IDS = 480  # number of ordinary ids in the tiny vocabulary; placeholder ids follow


def random_visual(rng: np.random.Generator, grid: tuple[int, int, int], merge: int, still: float = 0.0) -> Visual:
    """Returns an image or video of noise.

    Args:
      rng: Generator of the pixels.
      grid: Number of frames, patch rows and patch columns.
      merge: Spatial merge size.
      still: Share of the merge blocks that repeat the previous frame exactly; above 0 the video is pruned.
    """
    frames, height, width = grid
    blocks = rng.integers(0, 256, (frames, height * width // merge**2, merge**2 * PATCH_DIM), np.uint8)
    for frame in range(1, frames):
        repeated = rng.random(blocks.shape[1]) < still
        blocks[frame][repeated] = blocks[frame - 1][repeated]
    keep = keep_mask(blocks.astype(np.float32) / 127.5 - 1) if still else None
    return Visual(blocks.reshape(-1, PATCH_DIM), grid, merge, None if keep is None else keep.reshape(-1))


def random_sample(rng: np.random.Generator, visuals: list[Visual], text: int = 6, task: int = 0) -> Sample:
    """Returns a sample with `text` random supervised tokens before, between and after the visuals."""
    tokens, is_vision = [rng.integers(1, TEXT_IDS, text)], [np.zeros(text, bool)]
    for visual in visuals:
        tokens += [np.zeros(visual.num_tokens, int), rng.integers(1, TEXT_IDS, text)]
        is_vision += [np.ones(visual.num_tokens, bool), np.zeros(text, bool)]
    is_vision = np.concatenate(is_vision)
    return Sample(np.concatenate(tokens), is_vision, visuals, (~is_vision).astype(np.float32), task)


def shape_for(rows: list[list[Sample]], vision_rows: int = 1, spare: int = 0) -> BatchShape:
    """Returns the smallest capacities for these rows, rounded up to multiples of 8, plus `spare`."""

    def round_up(size: int) -> int:
        return -(-max(size, 1) // 8) * 8 + spare

    patches = max(sum(len(v.patches) for sample in row for v in sample.visuals) for row in rows)
    return BatchShape(
        length=round_up(max(sum(len(sample.tokens) for sample in row) for row in rows)),
        patches=round_up(patches),
        vision_tokens=round_up(max(sum(sample.num_vision_tokens for sample in row) for row in rows)),
        vision_rows=vision_rows,
        samples=max(len(row) for row in rows),
    )
