"""Tests of the frame pruner in NumPy and JAX against the threshold and the reference."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl3_jax.processing.diff_pruning import keep_mask

BLOCK = 4 * 588


def normalised(pixels: np.ndarray) -> np.ndarray:
    return (pixels.astype(np.float32) * np.float32(1 / 255) - np.float32(0.5)) / np.float32(0.5)


@pytest.mark.parametrize(("changed", "kept"), [(117, False), (118, True)])
def test_threshold_lies_between_117_and_118_grey_levels(changed, kept):
    pixels = np.full((2, 2, BLOCK), 100, np.uint8)
    pixels[1, 1, :changed] += 1
    assert keep_mask(normalised(pixels))[1, 1] == kept


def test_a_single_frame_is_kept_whole():
    assert keep_mask(np.zeros((1, 6, BLOCK), np.float32)).all()


def test_a_static_frame_keeps_its_first_blocks():
    static = np.zeros((3, 6, BLOCK), np.float32)
    np.testing.assert_array_equal(keep_mask(static).sum(1), [6, 1, 1])
    np.testing.assert_array_equal(keep_mask(static, min_tokens=3)[1:].any(0), [True] * 3 + [False] * 3)
    np.testing.assert_array_equal(keep_mask(static, min_tokens=0).sum(1), [6, 0, 0])


def test_blocks_are_compared_with_the_previous_frame_not_the_last_kept_one():
    """A drift of a twentieth of a grey level per frame is pruned in every frame."""
    drift = np.arange(50, dtype=np.float32)[:, None, None] * (0.09 / 255)
    mask = keep_mask(np.broadcast_to(drift, (50, 4, BLOCK)))
    assert mask[1:].sum() == 49


def video_arguments():
    """Strategy for the arguments of `video_blocks`: frames, blocks per frame, static share, seed."""
    return st.tuples(st.integers(1, 5), st.integers(1, 7), st.floats(0, 1), st.integers(0, 2**31))


def video_blocks(frames, blocks, static_share, seed):
    """Returns [frames, blocks, K] normalised pixels, with static blocks and changes around the threshold."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (frames, blocks, BLOCK), np.uint8)
    for frame in range(1, frames):
        pixels[frame] = np.where(rng.random((blocks, 1)) < static_share, pixels[frame - 1], pixels[frame])
        near_threshold = rng.random(blocks) < 0.3
        flips = rng.random((near_threshold.sum(), BLOCK)) < 0.05
        pixels[frame, near_threshold] = pixels[frame - 1, near_threshold] ^ flips
    return normalised(pixels)


@settings(deadline=None)
@given(video=video_arguments(), threshold=st.sampled_from([0.0, 0.1, 1.0]), min_tokens=st.integers(0, 3))
def test_numpy_and_jax_agree(video, threshold, min_tokens):
    blocks = video_blocks(*video)
    on_device = jax.jit(keep_mask, static_argnums=(1, 2))(jnp.asarray(blocks), threshold, min_tokens)
    np.testing.assert_array_equal(keep_mask(blocks, threshold, min_tokens), on_device)


def test_bfloat16_pixels_are_compared_in_bfloat16():
    blocks = video_blocks(4, 6, 0.5, 0)
    mask = keep_mask(jnp.asarray(blocks.astype(ml_dtypes.bfloat16)))
    assert mask.dtype == bool
    assert np.mean(np.asarray(mask) != keep_mask(blocks)) < 0.2


@settings(deadline=None)
@given(video=video_arguments(), merge=st.sampled_from([1, 2]))
def test_mask_equals_the_reference(video, merge):
    reference = pytest.importorskip(
        "support.reference", reason="the reference is not installed: pip install -e '.[parity]'"
    )
    blocks = video_blocks(*video)
    if merge == 1:
        blocks = blocks.reshape(blocks.shape[0], -1, 588)
    np.testing.assert_array_equal(keep_mask(blocks).reshape(-1), reference.compression_mask(blocks, merge))
