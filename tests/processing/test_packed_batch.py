"""Tests of packing: samples round-trip, frames stay whole, and rows beyond the capacity are refused."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.samples import random_sample, random_visual, shape_for
from vl3_jax.processing.packed_batch import BatchShape, CapacityError, Sample, Visual, block_coordinates, pack


def test_patches_are_in_merge_block_order():
    expected = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert list(map(tuple, block_coordinates(4, 4, 2)[:8])) == expected
    assert list(map(tuple, block_coordinates(2, 3, 1))) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


@st.composite
def mixtures(draw):
    """Generates rows of samples with any mixture of text, images and (pruned) videos."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))

    def visual():
        merge = draw(st.sampled_from([1, 2]))
        frames = draw(st.integers(1, 4))
        grid = (frames, merge * draw(st.integers(1, 3)), merge * draw(st.integers(1, 3)))
        return random_visual(rng, grid, merge, draw(st.sampled_from([0.0, 0.7])))

    def sample():
        visuals = [visual() for _ in range(draw(st.integers(0, 2)))]
        return random_sample(rng, visuals, draw(st.integers(1, 5)), task=draw(st.integers(0, 9)))

    return [[sample() for _ in range(draw(st.integers(0, 3)))] for _ in range(draw(st.integers(1, 2)))]


@settings(deadline=None)
@given(rows=mixtures(), vision_rows=st.sampled_from([1, 3]), spare=st.sampled_from([0, 16]))
def test_unpacking_restores_every_sample(rows, vision_rows, spare):
    shape = dataclasses.replace(shape_for(rows, vision_rows, spare), samples=3)
    batch = pack(rows, shape)
    for index, samples in enumerate(rows):
        row = {name: array[index] for name, array in batch.items()}
        flat_patches, flat_hw = row["patches"].reshape(-1, 588), row["patch_hw"].reshape(-1, 2)
        flat_segment = (row["patch_segment"] + 1000 * np.arange(vision_rows)[:, None]).reshape(-1)
        assert row["segment_ids"].max(initial=0) == len(samples)
        frame_segments = []
        for segment, sample in enumerate(samples, start=1):
            in_sample = row["segment_ids"] == segment
            np.testing.assert_array_equal(row["tokens"][in_sample], sample.tokens)
            np.testing.assert_array_equal(row["positions"][in_sample], np.arange(len(sample.tokens)))
            np.testing.assert_array_equal(row["targets"][in_sample][:-1], sample.tokens[1:])
            np.testing.assert_array_equal(row["loss_weight"][in_sample], [*sample.loss_weight[1:], 0])
            np.testing.assert_array_equal(row["vision_slot"][in_sample] >= 0, sample.is_vision)
            assert row["sample_task"][segment - 1] == sample.task
            slots = row["vision_slot"][in_sample][sample.is_vision]
            offset = 0
            for visual in sample.visuals:
                blocks = visual.patches.reshape(len(visual.keep), visual.merge**2, 588)
                coordinates = np.tile(block_coordinates(*visual.grid[1:], visual.merge), (visual.grid[0], 1))
                coordinates = coordinates.reshape(len(visual.keep), visual.merge**2, 2)
                token_patches = row["token_patches"][slots[offset : offset + visual.num_tokens]]
                assert np.all((token_patches >= 0).sum(1) == visual.merge**2)
                token_patches = token_patches[:, : visual.merge**2]
                np.testing.assert_array_equal(flat_patches[token_patches], blocks[visual.keep])
                np.testing.assert_array_equal(flat_hw[token_patches], coordinates[visual.keep])
                frames = np.repeat(np.arange(visual.grid[0]), visual.tokens_per_frame)[visual.keep]
                for frame in range(visual.grid[0]):
                    segments_of_frame = np.unique(flat_segment[token_patches[frames == frame]])
                    assert len(segments_of_frame) == 1  # a frame is one segment of one vision row
                    frame_segments.append(segments_of_frame[0])
                offset += visual.num_tokens
        assert len(frame_segments) == len(set(frame_segments))
        assert np.all(row["loss_weight"][row["segment_ids"] == 0] == 0)


def test_exceeding_a_capacity_is_refused():
    rng = np.random.default_rng(0)
    sample = random_sample(rng, [random_visual(rng, (2, 4, 4), 2)])
    shape = BatchShape(length=64, patches=32, vision_tokens=8)
    pack([[sample]], shape)
    for field, size, message in [
        ("length", 19, "20 tokens do not fit a row of 19"),
        ("patches", 31, "a frame of 16 patches does not fit 1 vision rows of 31"),
        ("vision_tokens", 7, "more than 7 vision tokens"),
    ]:
        with pytest.raises(CapacityError, match=message):
            pack([[sample]], dataclasses.replace(shape, **{field: size}))
    with pytest.raises(CapacityError, match="2 samples do not fit a row of 1"):
        pack([[Sample(np.arange(3)), Sample(np.arange(3))]], dataclasses.replace(shape, samples=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (1, 3, 3), "merge": 3}, "merge size 3 is not supported"),
        ({"grid": (1, 3, 3), "merge": 2}, "does not divide"),
        ({"grid": (1, 3, 4), "merge": 1}, "asks for 12 patches"),
        ({"grid": (1, 3, 3), "merge": 1, "keep": np.ones(4, bool)}, "has 9 tokens"),
    ],
)
def test_invalid_visuals_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Visual(np.zeros((9, 588), np.uint8), **arguments)


def test_placeholders_must_match_the_vision_tokens():
    image = Visual(np.zeros((4, 588), np.uint8), (1, 2, 2))
    with pytest.raises(ValueError, match="3 placeholders for 4 vision tokens"):
        Sample(np.arange(5), np.array([1, 1, 1, 0, 0], bool), [image])
