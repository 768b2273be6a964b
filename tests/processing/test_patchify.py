"""Tests of patches: their order and layout."""

import numpy as np
import pytest

from vl3_jax.processing.packed_batch import block_coordinates
from vl3_jax.processing.patchify import patchify


@pytest.mark.parametrize("merge", [1, 2])
def test_patches_are_cut_in_merge_block_order(merge):
    frames = np.random.default_rng(0).integers(0, 256, (3, 56, 84, 3), np.uint8)
    patches = patchify(frames, merge).reshape(3, 24, 588)
    for frame in range(3):
        for index, (row, column) in enumerate(block_coordinates(4, 6, merge)):
            pixels = frames[frame, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
            np.testing.assert_array_equal(patches[frame, index], pixels.transpose(2, 0, 1).reshape(-1))
