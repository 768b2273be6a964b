"""Random samples with pictures and videos, for every test that needs some."""

import numpy as np

from vl3_jax.processing.diff_pruning import keep_mask
from vl3_jax.processing.packed_batch import PATCH_DIM, BatchShape, Sample, Visual

TEXT_IDS = 480  # ordinary ids of the tiny vocabulary; above lie the placeholders


def random_visual(rng: np.random.Generator, grid: tuple[int, int, int], merge: int, still: float = 0.0) -> Visual:
    """A picture or video of noise.

    Args:
      rng: source of the pixels.
      grid: frames, patch rows, patch columns.
      merge: spatial merge size.
      still: share of the merge blocks that repeat the frame before, exactly.
    """
    frames, height, width = grid
    blocks = rng.integers(0, 256, (frames, height * width // merge**2, merge**2 * PATCH_DIM), np.uint8)
    for frame in range(1, frames):
        same = rng.random(blocks.shape[1]) < still
        blocks[frame][same] = blocks[frame - 1][same]
    keep = keep_mask(blocks.astype(np.float32) / 127.5 - 1) if still else None
    return Visual(blocks.reshape(-1, PATCH_DIM), grid, merge, None if keep is None else keep.reshape(-1))


def random_sample(rng: np.random.Generator, visuals: list[Visual], text: int = 6, task: int = 0) -> Sample:
    """`text` random tokens before, between and after the visuals, all supervised."""
    parts, marks = [rng.integers(1, TEXT_IDS, text)], [np.zeros(text, bool)]
    for visual in visuals:
        parts += [np.zeros(visual.num_tokens, int), rng.integers(1, TEXT_IDS, text)]
        marks += [np.ones(visual.num_tokens, bool), np.zeros(text, bool)]
    is_vision = np.concatenate(marks)
    return Sample(np.concatenate(parts), is_vision, visuals, (~is_vision).astype(np.float32), task)


def shape_for(rows: list[list[Sample]], vision_rows: int = 1, spare: int = 0) -> BatchShape:
    """The smallest capacities for these rows, each multiple of 8, plus `spare`."""

    def fit(size: int) -> int:
        return -(-max(size, 1) // 8) * 8 + spare

    patches = max(sum(len(v.patches) for sample in row for v in sample.visuals) for row in rows)
    return BatchShape(
        length=fit(max(sum(len(sample.tokens) for sample in row) for row in rows)),
        patches=fit(patches),
        vision_tokens=fit(max(sum(sample.num_vision_tokens for sample in row) for row in rows)),
        vision_rows=vision_rows,
        samples=max(len(row) for row in rows),
    )
