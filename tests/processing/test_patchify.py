"""Tests of patches: their order and layout, and the pruning mask computed from uint8 patches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl3_jax.processing.diff_pruning import keep_mask
from vl3_jax.processing.packed_batch import block_coordinates
from vl3_jax.processing.patchify import normalise, patchify, pruning_mask

GREY = (0.5, 0.5, 0.5)


@pytest.mark.parametrize("merge", [1, 2])
def test_patches_are_cut_in_merge_block_order(merge):
    frames = np.random.default_rng(0).integers(0, 256, (3, 56, 84, 3), np.uint8)
    patches = patchify(frames, merge).reshape(3, 24, 588)
    for frame in range(3):
        for index, (row, column) in enumerate(block_coordinates(4, 6, merge)):
            pixels = frames[frame, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
            np.testing.assert_array_equal(patches[frame, index], pixels.transpose(2, 0, 1).reshape(-1))


def nearly_static_patches(rng, frames, blocks, merge):
    """Returns patches of mostly repeated frames, with changes around the threshold of 117.6 grey levels per block."""
    num_values = merge**2 * 588
    video = np.repeat(rng.integers(1, 255, (1, blocks, num_values), np.uint8), frames, axis=0)
    for frame in range(1, frames):
        video[frame] = video[frame - 1]
        for block in range(blocks):
            video[frame, block, : rng.choice([0, 29, 30, 117, 118, num_values])] ^= 1
    return video.reshape(-1, 588)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    frames=st.integers(1, 6),
    merge=st.sampled_from([1, 2]),
    threshold=st.sampled_from([0.0, 0.1, 0.5, 50.0]),
    mean_std=st.sampled_from([(GREY, GREY), (GREY, (0.25, 0.25, 0.25)), ((0.48, 0.45, 0.4), (0.26, 0.27, 0.28))]),
    min_tokens=st.integers(0, 2),
)
def test_mask_equals_that_of_normalised_pixels(seed, frames, merge, threshold, mean_std, min_tokens):
    patches = nearly_static_patches(np.random.default_rng(seed), frames, 5, merge)
    pixels = normalise(patches, *mean_std).reshape(frames, 5, -1)
    mask = pruning_mask(patches, frames, merge, threshold, min_tokens, *mean_std)
    np.testing.assert_array_equal(mask, keep_mask(pixels, threshold, min_tokens).reshape(-1))


@pytest.mark.parametrize(("changed", "kept"), [(117, False), (118, True)])
def test_threshold_lies_between_117_and_118_grey_levels(changed, kept):
    patches = np.full((2, 2, 4 * 588), 100, np.uint8)
    patches[1, 1, :changed] += 1
    mask = pruning_mask(patches.reshape(-1, 588), 2, 2, 0.1, 1, GREY, GREY)
    np.testing.assert_array_equal(mask, [True, True, not kept, kept])


def test_mask_does_not_depend_on_the_chunk_size(monkeypatch):
    patches = nearly_static_patches(np.random.default_rng(1), 9, 5, 2)
    whole = pruning_mask(patches, 9, 2, 0.1, 1, GREY, GREY)
    monkeypatch.setattr("vl3_jax.processing.patchify._CHUNK_BYTES", 1)
    np.testing.assert_array_equal(pruning_mask(patches, 9, 2, 0.1, 1, GREY, GREY), whole)
