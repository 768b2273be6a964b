"""Tests the interpreted TPU kernels against dense attention, and their schedules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from support.attention import make_segment_info, random_qkv, stack_rows, value_and_gradients
from support.tolerances import ATTENTION, ATTENTION_BFLOAT16
from vl3_jax.kernels import tpu_attention as module
from vl3_jax.kernels.block_sizes import BlockSizes
from vl3_jax.kernels.dense import dense_attention
from vl3_jax.kernels.ring import ring_attention
from vl3_jax.kernels.segment_info import SegmentInfo, active_blocks
from vl3_jax.kernels.tpu_attention import tpu_attention, tpu_backend
from vl3_jax.kernels.tpu_schedule import fits_schedule, pair_schedule
from vl3_jax.parallel.mesh import make_mesh

TOLERANCE = {jnp.float32: ATTENTION, jnp.bfloat16: ATTENTION_BFLOAT16}


@functools.cache
def interpreted(blocks: BlockSizes | None):
    return functools.partial(tpu_attention, blocks=blocks, interpret=True)


def assert_equal_to_dense(blocks, qkv, q_info, kv_info, causal, dtype=jnp.float32):
    qkv = [x.astype(dtype) for x in qkv]
    out, gradients = value_and_gradients(interpreted(blocks), *qkv, q_info, kv_info, causal)
    qkv = [x.astype(jnp.float32) for x in qkv]
    expected, expected_gradients = value_and_gradients(dense_attention, *qkv, q_info, kv_info, causal)
    for ours, dense in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours.astype(jnp.float32), dense, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    return out, gradients


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "causal", "blocks"),
    [
        (4, 4, 72, False, BlockSizes(128, 128, 2, 2)),  # two head groups
        (6, 2, 128, True, BlockSizes(256, 128, 1, 2)),  # groups of three heads, unrolled by two
    ],
)
def test_equal_to_dense(heads, kv_heads, width, causal, blocks, dtype):
    """Rows of 300 tokens in blocks of 128: segments end inside a block, one row is empty, padding is first or last."""
    info = stack_rows(
        make_segment_info([90, 5, 160], 300),
        make_segment_info([], 300),
        make_segment_info([170], 300, padding_first=True),
    )
    out, gradients = assert_equal_to_dense(
        blocks, random_qkv(3, 300, 300, heads, kv_heads, width), info, info, causal, dtype
    )
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
    assert_equal_to_dense(blocks, random_qkv(1, 150, 384, 4, 2, 16), q_info, kv_info, causal)


def test_equal_to_dense_with_tuned_blocks():
    """The row is one block, shorter than the tuned one."""
    info = make_segment_info([20, 60], 90)
    assert_equal_to_dense(None, random_qkv(1, 90, 90, 4, 2, 16), info, info, True)


def test_rows_are_processed_one_by_one_when_their_schedule_is_too_long(monkeypatch):
    row_counts = []
    monkeypatch.setattr(module, "fits_schedule", lambda rows, *counts: row_counts.append(rows) or rows == 1)
    info = stack_rows(make_segment_info([100, 90], 200), make_segment_info([150], 200))
    # Blocks that no other test uses, because the function must be compiled anew.
    assert_equal_to_dense(BlockSizes(128, 256, 1, 1), random_qkv(2, 200, 200, 2, 1, 16), info, info, True)
    assert row_counts == [2, 2]


def test_inactive_blocks_are_not_read():
    """Keys and queries of a block without active pairs may be anything."""
    blocks = BlockSizes(128, 128, 1, 1)
    info = make_segment_info([128, 128, 128], 384)
    qkv = random_qkv(1, 384, 384, 2, 1, 16)
    clean = value_and_gradients(interpreted(blocks), *qkv, info, info, False)
    broken = [x.at[:, 128:256].set(np.nan) for x in qkv]
    results = value_and_gradients(interpreted(blocks), *broken, info, info, False)
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
    mesh = make_mesh({"context": 2}, jax.devices()[:2])
    info = make_segment_info([60, 110], 256)
    backend = tpu_backend(BlockSizes(128, 128, 2, 1), interpret=True)

    def ring(*operands, causal, scale):
        split = PartitionSpec(None, "context")
        info = SegmentInfo(split, split)
        run = functools.partial(ring_attention, causal=causal, scale=scale, axis="context", local=backend)
        return jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(split, split, split, info, info),
            out_specs=split,
            check_vma=False,
        )(*operands)

    qkv = random_qkv(1, 256, 256, 4, 2, 16)
    results = value_and_gradients(ring, *qkv, info, info, True)
    expected = value_and_gradients(dense_attention, *qkv, info, info, True)
    for ours, dense in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, dense, atol=ATTENTION, rtol=ATTENTION)
