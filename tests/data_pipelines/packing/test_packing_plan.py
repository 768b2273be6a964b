"""Tests packing plans: each sample once, within capacity, well filled, fast, deterministic."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_datasets import SETTINGS

from data_pipelines.mixtures import data_settings, mixture
from data_pipelines.packing.lengths import MediaInfo, SampleLengths
from data_pipelines.packing.packing_plan import epoch_order, packing_efficiency, plan_packing
from data_pipelines.packing.sample_sizes import SampleSizes, compute_sample_sizes, concatenate
from data_pipelines.settings import DataSettings
from support.samples import random_sample, random_visual
from vl3_jax.bench.bench_packer import random_lengths
from vl3_jax.processing.packed_batch import BatchShape, pack
from vl3_jax.processing.processor_config import ProcessorConfig


def random_sizes(rng, count, shape, frames=False):
    tokens = rng.integers(1, shape.length + 1, count)
    vision = (tokens * rng.choice([0, 0.5, 1], count)).astype(int).clip(max=shape.vision_tokens)
    frame = rng.integers(1, shape.patches + 1, count)
    repeats = np.minimum(rng.integers(1, 4, count), shape.patches // frame).clip(min=1)
    runs = [((int(f), int(n)),) if v else () for f, n, v in zip(frame, repeats, vision, strict=True)]
    patches = np.array([sum(f * n for f, n in run) for run in runs], int)
    return SampleSizes(tokens, vision, patches, np.ones(count, bool), runs if frames else None)


def data_settings_of(shape, shorter_lengths=()):
    return DataSettings(shape, ProcessorConfig(), shorter_lengths)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(0, 120),
    st.sampled_from([1, 3]),
    st.sampled_from([4, 16, 500]),
    st.sampled_from([(), (40,), (70, 40)]),
)
def test_rows_hold_every_sample_within_capacity(seed, count, vision_rows, window, shorter):
    rng = np.random.default_rng(seed)
    longest = BatchShape(100, 80, 60, vision_rows, samples=5)
    sizes = random_sizes(rng, count, longest, frames=vision_rows > 1)
    order, data = rng.permutation(count), data_settings_of(longest, shorter)
    plan = plan_packing(sizes, order, data, (seed,), window)
    assert sorted(plan.samples.tolist()) == list(range(count))
    for number, length in enumerate(plan.lengths.tolist()):
        row, shape = plan[number], data.row_shape(length)
        assert 1 <= len(row) <= shape.samples
        assert sizes.tokens[row].sum() <= length
        assert sizes.vision_tokens[row].sum() <= shape.vision_tokens
        assert sizes.patches[row].sum() <= shape.patches * vision_rows
        largest = max(sizes.tokens[row].max(), sizes.vision_tokens[row].max())
        assert length == min(n for n in (*shorter, 100) if n >= largest)
    again = plan_packing(sizes, order, data, (seed,), window)
    np.testing.assert_array_equal(again.samples, plan.samples)
    np.testing.assert_array_equal(again.offsets, plan.offsets)
    np.testing.assert_array_equal(again.lengths, plan.lengths)


def test_a_plan_over_several_vision_rows_can_be_packed():
    rng = np.random.default_rng(0)
    shape = BatchShape(400, 20, 200, vision_rows=3)
    samples = []
    for _ in range(60):
        grids = [(int(rng.integers(1, 4)), 1, int(rng.integers(2, 12))) for _ in range(rng.integers(0, 3))]
        grids = grids if sum(t * w for t, _, w in grids) <= 20 else grids[:1]
        samples.append(random_sample(rng, [random_visual(rng, grid, 1) for grid in grids if grid[0] * grid[2] <= 20]))
    sizes = SampleSizes(
        np.array([len(sample.tokens) for sample in samples]),
        np.array([sample.num_vision_tokens for sample in samples]),
        np.array([sum(len(visual.patches) for visual in sample.visuals) for sample in samples]),
        np.ones(len(samples), bool),
        [tuple((visual.patches_per_frame, visual.grid[0]) for visual in sample.visuals) for sample in samples],
    )
    plan = plan_packing(sizes, np.arange(len(samples)), data_settings_of(shape), (0,), 16)
    pack([[samples[number] for number in plan[row]] for row in range(len(plan))], shape)
    assert len(plan) < 40


def test_epochs_follow_permutations():
    usable = [np.array([True] * 10 + [False] * 3), np.ones(7, bool), np.ones(4, bool)]
    weights = [1.0, 0.5, 2.0]
    epochs = [epoch_order(usable, weights, 0, epoch) for epoch in range(4)]
    for order in epochs:
        assert sorted(order[order < 13].tolist()) == list(range(10))
        assert sorted(order[order >= 20].tolist()) == sorted([*range(20, 24)] * 2)
    half = np.concatenate([order[(order >= 13) & (order < 20)] for order in epochs])
    assert sorted(half.tolist()) == sorted([*range(13, 20)] * 2)
    assert sorted(half[:7].tolist()) == list(range(13, 20))
    assert not np.array_equal(epochs[0], epochs[1])
    np.testing.assert_array_equal(epochs[1], epoch_order(usable, weights, 0, 1))
    assert not np.array_equal(epochs[1], epoch_order(usable, weights, 1, 1))
    assert len(epoch_order([np.zeros(3, bool)], [1.0], 0, 0)) == 0


def test_sizes_of_bad_and_too_long_samples():
    many = SampleLengths(10, tuple(MediaInfo(False, 50, 50) for _ in range(100)))
    long = SampleLengths(600, ())
    sizes = compute_sample_sizes(
        [SampleLengths(5), SampleLengths(-1), many, long, SampleLengths(400, (MediaInfo(False, 400, 400),))],
        SETTINGS,
        "d",
    )
    assert sizes.usable.tolist() == [True, False, False, True, True]
    assert (sizes.shrunk, sizes.cut, sizes.cut_tokens) == (1, 1, 88)
    (error,) = sizes.errors
    assert (error.where, error.kind) == ("d, sample 3", "too long")
    both = concatenate([sizes, sizes])
    assert (len(both), both.usable.sum(), len(both.errors)) == (10, 6, 2)


def stage_like(count):
    """Returns lengths as in stage 4: many short videos, long ones at the limit, images and text."""
    rng = np.random.default_rng(0)
    lengths = []
    for kind in rng.choice(3, count, p=[0.57, 0.16, 0.27]):
        if kind == 0:
            frames = int(np.clip(rng.lognormal(3.2, 1.0), 3, 180))
            height, width = [(256, 340), (336, 596), (360, 640), (720, 1280)][rng.integers(4)]
            lengths.append(SampleLengths(100 + 9 * frames, (MediaInfo(True, height, width, frames),)))
        elif kind == 1:
            lengths.append(SampleLengths(250, (MediaInfo(False, 480, int(rng.integers(300, 900))),)))
        else:
            lengths.append(SampleLengths(int(rng.lognormal(6.5, 0.7)), ()))
    return lengths


def test_rows_are_full_and_planning_is_fast():
    config = data_settings(mixture())
    lengths = stage_like(20_000)
    start = time.process_time()
    sizes = compute_sample_sizes(lengths, config)
    order = epoch_order([sizes.usable], [1.0], 0, 0)
    plan = plan_packing(sizes, order, config, (0, 0))
    seconds = time.process_time() - start
    efficiency = packing_efficiency(plan, sizes, config)
    assert efficiency.either >= 0.96  # the mixture of `vl3 bench packer` reaches 0.97; this one is smaller
    assert efficiency.either >= max(efficiency.tokens, efficiency.patches)
    assert len(order) / seconds > 20_000


def test_shorter_rows_are_full_of_tokens_too():
    """In the proportions of stage 4, as `vl3 bench packer` packs them."""
    data = data_settings(mixture(image_merge=2, shorter_lengths=(11_264,)))
    sizes = compute_sample_sizes(random_lengths(20_000), data)
    plan = plan_packing(sizes, epoch_order([sizes.usable], [1.0], 0, 0), data, (0, 0))
    efficiency = packing_efficiency(plan, sizes, data)
    assert efficiency.tokens >= 0.97
    assert efficiency.patches >= 0.94
    assert np.mean(plan.lengths == 11_264) > 0.98


@pytest.mark.parametrize("count", [0, 1])
def test_tiny_plans(count):
    sizes = compute_sample_sizes([SampleLengths(5)] * count, SETTINGS)
    plan = plan_packing(sizes, np.arange(count), SETTINGS, (0,))
    assert len(plan) == count
    assert packing_efficiency(plan, sizes, SETTINGS).tokens == count * 5 / 512
