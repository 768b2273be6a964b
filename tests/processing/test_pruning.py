"""Tests of pruning: the mask computed from uint8 patches, budgets, and the running budget of a live video."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl3_jax.errors import SettingError
from vl3_jax.processing import pruning
from vl3_jax.processing.diff_pruning import keep_mask
from vl3_jax.processing.packed_batch import PATCH_DIM, Visual
from vl3_jax.processing.patchify import normalise
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.pruning import RunningBudget, block_changes, prune, pruning_mask

GREY = (0.5, 0.5, 0.5)


def nearly_static(rng, frames, blocks, merge):
    """Returns a video of mostly repeated frames, with changes around the threshold of 117.6 grey levels per block."""
    num_values = merge**2 * PATCH_DIM
    video = np.repeat(rng.integers(1, 255, (1, blocks, num_values), np.uint8), frames, axis=0)
    for frame in range(1, frames):
        video[frame] = video[frame - 1]
        for block in range(blocks):
            video[frame, block, : rng.choice([0, 29, 30, 117, 118, num_values])] ^= 1
    return as_video(video, merge)


def as_video(blocks, merge=2):
    """Makes a video of blocks [frames, blocks, values]."""
    return Visual(blocks.reshape(-1, PATCH_DIM), (len(blocks), merge, merge * blocks.shape[1]), merge)


def noisy(rng, frames, blocks, levels):
    """Returns a static scene with normal noise of a standard deviation in grey levels."""
    scene = rng.uniform(20, 235, (blocks, 4 * PATCH_DIM))
    noise = rng.normal(0, levels, (frames, *scene.shape)) if levels else np.zeros((frames, 1, 1))
    return as_video(np.clip(np.rint(scene + noise), 0, 255).astype(np.uint8))


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
    video = nearly_static(np.random.default_rng(seed), frames, 5, merge)
    pixels = normalise(video.patches, *mean_std).reshape(frames, 5, -1)
    config = ProcessorConfig(image_mean=mean_std[0], image_std=mean_std[1], prune_min_tokens=min_tokens)
    np.testing.assert_array_equal(pruning_mask(video, threshold, config), keep_mask(pixels, threshold, min_tokens))


@pytest.mark.parametrize(("changed", "kept"), [(117, False), (118, True)])
def test_threshold_lies_between_117_and_118_grey_levels(changed, kept):
    blocks = np.full((2, 2, 4 * PATCH_DIM), 100, np.uint8)
    blocks[1, 1, :changed] += 1
    mask = pruning_mask(as_video(blocks), 0.1, ProcessorConfig())
    np.testing.assert_array_equal(mask, [[True, True], [not kept, kept]])


def test_mask_does_not_depend_on_the_chunk_size(monkeypatch):
    video, config = nearly_static(np.random.default_rng(1), 9, 5, 2), ProcessorConfig()
    whole = pruning_mask(video, 0.1, config)
    monkeypatch.setattr(pruning, "_CHUNK_BYTES", 1)
    np.testing.assert_array_equal(pruning_mask(video, 0.1, config), whole)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    noise=st.sampled_from([0.0, 0.05, 0.5, 2.0]),
    share=st.floats(0.01, 1),
    least=st.sampled_from([0.0, 0.1, 3.0]),
    min_tokens=st.integers(0, 3),
    equal=st.booleans(),
)
def test_a_budget_is_never_exceeded_and_its_threshold_is_the_smallest(seed, noise, share, least, min_tokens, equal):
    rng = np.random.default_rng(seed)
    videos = [noisy(rng, int(rng.integers(1, 7)), 6, noise), nearly_static(rng, 4, 5, 2), nearly_static(rng, 1, 4, 2)]
    if equal:  # many blocks of the very same change
        videos[0] = as_video(np.repeat(np.arange(5, dtype=np.uint8), 6 * 4 * PATCH_DIM).reshape(5, 6, -1))
    total = sum(len(video.keep) for video in videos)
    config = ProcessorConfig(prune_threshold=least, prune_min_tokens=min_tokens)
    whole = 4 + sum(min(min_tokens, 6) if frame else 6 for frame in range(videos[0].grid[0])) + 5 + 3 * min_tokens
    tokens = max(2, int(share * total))
    limited = dataclasses.replace(config, visual_budget=float(tokens))
    if tokens < whole:
        with pytest.raises(SettingError, match=f"visual_budget.*give {whole} or more"):
            prune(videos, [True, True, False], limited)
        return
    pruned, threshold = prune(videos, [True, True, False], limited)
    assert sum(visual.num_tokens for visual in pruned) <= tokens
    assert threshold >= least
    again, _ = prune(videos, [True, True, False], dataclasses.replace(config, prune_threshold=threshold))
    assert [visual.keep.tolist() for visual in again] == [visual.keep.tolist() for visual in pruned]
    if threshold > least and min_tokens < 2:  # a smaller one keeps too many
        lower = max(threshold - 2e-3 * max(1.0, threshold), 0.0)
        more = [pruning_mask(visual, lower, config).sum() for visual in videos[:2]]
        assert sum(more) + 4 > tokens


def test_a_share_counts_all_tokens_of_the_prompt():
    video = noisy(np.random.default_rng(0), 10, 20, 2.0)
    image = Visual(np.zeros((12, PATCH_DIM), np.uint8), (1, 3, 4))
    kept, threshold = prune([image, video], [False, True], ProcessorConfig(visual_budget=0.5))
    assert kept[0].num_tokens == 12
    assert kept[0].num_tokens + kept[1].num_tokens == 106
    assert 3 < threshold < 5  # twice the mean change of noise of 2 levels, 2.26
    for budget in (1.0, 212.0):
        assert prune([image, video], [False, True], ProcessorConfig(visual_budget=budget))[1] == 0.1
    with pytest.raises(SettingError, match="give 41 or more"):
        prune([image, video], [False, True], ProcessorConfig(visual_budget=40.0))


@pytest.mark.parametrize("values", [{"visual_budget": 2.5}, {"visual_budget": 0.5, "prune_threshold": None}])
def test_impossible_budgets_are_refused(values):
    with pytest.raises(SettingError, match="visual_budget"):
        ProcessorConfig(**values)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("levels", [0, 0.1, 0.5, 2])
def test_a_running_budget_holds_after_the_first_frames(share, levels):
    rng, blocks = np.random.default_rng(0), 40
    video = noisy(rng, 60, blocks, levels)
    running, kept = RunningBudget(share), blocks
    for frame, changes in enumerate(block_changes(video, GREY), start=2):
        mask = running.keep(changes)
        np.testing.assert_array_equal(mask[1:], changes[1:] > running.threshold)
        kept += int(mask.sum())
        assert mask.any()
        if frame > 2 / share:  # the first frame is kept whole, each other has a token at least
            assert kept <= share * blocks * frame
    if levels:
        assert kept >= 0.9 * share * blocks * 60
    else:
        assert kept == blocks + 59
