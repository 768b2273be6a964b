"""Tests the interpreted TPU kernels against dense attention, and their schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.attention import (
    attention_of,
    cast,
    make_segment_info,
    random_inputs,
    ring_over_arrays,
    stack_rows,
    value_and_gradients,
)
from support.tolerances import ATTENTION, ATTENTION_BFLOAT16
from vl3_jax.kernels import tpu_attention as module
from vl3_jax.kernels.block_sizes import BlockSizes
from vl3_jax.kernels.dense import dense_attention
from vl3_jax.kernels.segment_info import SegmentInfo, active_blocks
from vl3_jax.kernels.tpu_attention import tpu_backend
from vl3_jax.kernels.tpu_schedule import fits_schedule, pair_schedule

TOLERANCE = {"float32": ATTENTION, "bfloat16": ATTENTION_BFLOAT16}


def interpreted(blocks: BlockSizes | None):
    return attention_of(tpu_backend(blocks, interpret=True))


def dense_rotated(inputs):
    return dense_attention(inputs.rotated())


def assert_equal_to_dense(blocks, inputs):
    dtype = inputs.q.dtype
    out, gradients = value_and_gradients(interpreted(blocks), inputs)
    expected, expected_gradients = value_and_gradients(dense_rotated, cast(inputs, jnp.float32))
    for ours, dense in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert ours.dtype == dtype
        tolerance = TOLERANCE[dtype.name]
        np.testing.assert_allclose(ours.astype(jnp.float32), dense, atol=tolerance, rtol=tolerance)
    return out, gradients


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "causal", "blocks"),
    [
        (4, 4, 72, False, BlockSizes(128, 128, 2, 2)),  # two head groups
        (6, 2, 128, True, BlockSizes(256, 128, 1, 2)),  # groups of three heads, unrolled by two
        (1, 1, 256, False, BlockSizes(128, 256, 1, 1)),  # a head that fills two registers
        pytest.param(2, 2, 512, True, BlockSizes(128, 128, 2, 1), marks=pytest.mark.slow),
    ],
)
def test_equal_to_dense(heads, kv_heads, width, causal, blocks, dtype):
    """Rows of 300 tokens in blocks of 128: segments end inside a block, one row is empty, padding is first or last."""
    info = stack_rows(
        make_segment_info([90, 5, 160], 300),
        make_segment_info([], 300),
        make_segment_info([170], 300, padding_first=True),
    )
    inputs = random_inputs(heads, kv_heads, width, info, causal=causal, dtype=dtype, rotary=True)
    out, gradients = assert_equal_to_dense(blocks, inputs)
    for array in (out, *gradients):
        assert not np.any(array[1])
        assert not np.any(array[0, 255:])
        assert not np.any(array[2, :130])


@pytest.mark.parametrize(
    ("causal", "blocks"), [(True, BlockSizes(128, 256, 2, 1)), (False, BlockSizes(128, 128, 1, 1))]
)
def test_equal_to_dense_against_more_keys_in_any_order(causal, blocks):
    """Queries continue segments whose keys are in any order, with freed slots between them."""
    rng = np.random.default_rng(0)
    kv_info = make_segment_info([70, 2, 101, 50, 90], 384)
    order = rng.permutation(384)
    segment_ids = np.where(rng.random((1, 384)) < 0.3, 0, kv_info.segment_ids)
    kv_info = SegmentInfo(segment_ids[:, order], kv_info.positions[:, order])
    indices = rng.integers(0, 384, 150)
    q_info = SegmentInfo(kv_info.segment_ids[:, indices], kv_info.positions[:, indices])
    assert_equal_to_dense(blocks, random_inputs(4, 2, 16, q_info, kv_info, causal=causal))


def test_equal_to_dense_with_tuned_blocks():
    """The row is one block, shorter than the tuned one."""
    info = make_segment_info([20, 60], 90)
    assert_equal_to_dense(None, random_inputs(4, 2, 16, info, causal=True))


def test_rows_are_processed_one_by_one_when_their_schedule_is_too_long(monkeypatch):
    row_counts = []
    monkeypatch.setattr(module, "fits_schedule", lambda rows, *counts: row_counts.append(rows) or rows == 1)
    info = stack_rows(make_segment_info([100, 90], 200), make_segment_info([150], 200))
    # Blocks that no other test uses, because the function must be compiled anew.
    assert_equal_to_dense(BlockSizes(128, 256, 1, 1), random_inputs(2, 1, 16, info, causal=True))
    assert row_counts == [2, 2]


def test_inactive_blocks_are_not_read():
    """Keys and queries of a block without active pairs may be anything."""
    blocks = BlockSizes(128, 128, 1, 1)
    info = make_segment_info([128, 128, 128], 384)
    inputs = random_inputs(2, 1, 16, info, causal=False)
    clean = value_and_gradients(interpreted(blocks), inputs)
    q, k, v = (x.at[:, 128:256].set(np.nan) for x in (inputs.q, inputs.k, inputs.v))
    results = value_and_gradients(interpreted(blocks), inputs.replace(q=q, k=k, v=v))
    for ours, expected in zip(jax.tree.leaves(results), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(np.delete(ours, range(128, 256), 1), np.delete(expected, range(128, 256), 1))
        assert np.all(np.isnan(ours[:, 128:256]))


def scheduled_pairs(schedule, rows, outer_count, inner_count):
    """Returns how often each pair [rows, outer_count, inner_count] is scheduled, and the outer blocks in order."""
    pairs = np.asarray(schedule.pairs[: schedule.count])
    outer, inner = pairs >> 16, pairs & 0xFFFF
    np.testing.assert_array_equal(outer // outer_count, inner // inner_count)
    counts = np.zeros((rows, outer_count, inner_count), int)
    np.add.at(counts, (outer // outer_count, outer % outer_count, inner % inner_count), 1)
    return counts, outer


def test_schedule_has_the_active_pairs_and_one_of_each_idle_block():
    rng = np.random.default_rng(0)
    active = rng.random((3, 7, 5)) < 0.3
    active[1] = False
    active[0, 2] = False
    expected = active.copy()
    expected[..., 0] |= ~active.any(-1)
    counts, outer = scheduled_pairs(pair_schedule(jnp.asarray(active)), 3, 7, 5)
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_array_equal(outer, np.sort(outer))
    assert pair_schedule(jnp.asarray(active)).pairs[-1] == -1


def test_frames_are_paired_only_with_themselves():
    """160 frames of one block each give 160 pairs, not 25,600."""
    frames = make_segment_info([256] * 160, 40_960)
    assert pair_schedule(active_blocks(frames, frames, 256, 256, causal=False)).count == 160


def test_whether_a_schedule_fits():
    assert fits_schedule(5, 160, 160)  # five tower rows of 40,960 patches
    assert not fits_schedule(6, 160, 160)
    assert not fits_schedule(32_768, 1, 1)
    assert not fits_schedule(32_768, 1, 2)


def test_ring_attention():
    """The lse of a slice is merged with that of others, and the backward pass takes that of all keys."""
    backend = tpu_backend(BlockSizes(128, 128, 2, 1), interpret=True)
    inputs = random_inputs(4, 2, 16, make_segment_info([60, 110], 256), causal=True)
    results = value_and_gradients(ring_over_arrays(backend, devices=2), inputs)
    expected = value_and_gradients(dense_attention, inputs)
    for ours, dense in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, dense, atol=ATTENTION, rtol=ATTENTION)
