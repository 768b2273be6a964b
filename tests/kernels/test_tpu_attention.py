"""The TPU kernels, interpreted, against dense attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from support.attention import labels_of, random_qkv, value_and_gradients
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


def rows_of(*rows: SegmentInfo) -> SegmentInfo:
    return SegmentInfo(*(np.concatenate(x) for x in zip(*rows, strict=True)))


def assert_equal_to_dense(blocks, qkv, q_info, kv_info, causal, dtype=jnp.float32):
    low = [x.astype(dtype) for x in qkv]
    out, gradients = value_and_gradients(interpreted(blocks), *low, q_info, kv_info, causal)
    exact = [x.astype(jnp.float32) for x in low]
    expected, expected_gradients = value_and_gradients(dense_attention, *exact, q_info, kv_info, causal)
    for ours, theirs in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    return out, gradients


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "causal", "blocks"),
    [
        (4, 4, 72, False, BlockSizes(128, 128, 2, 2)),  # two steps
        (6, 2, 128, True, BlockSizes(256, 128, 1, 2)),  # groups of three heads, unrolled by two
    ],
)
def test_equal_to_dense(heads, kv_heads, width, causal, blocks, dtype):
    """Rows of 300 in blocks of 128: edges inside a block, an empty row, padding first and last."""
    labels = rows_of(labels_of([90, 5, 160], 300), labels_of([], 300), labels_of([170], 300, padding_first=True))
    out, gradients = assert_equal_to_dense(
        blocks, random_qkv(3, 300, 300, heads, kv_heads, width), labels, labels, causal, dtype
    )
    for array in (out, *gradients):
        assert not np.any(array[1])
        assert not np.any(array[0, 255:])
        assert not np.any(array[2, :130])


@pytest.mark.parametrize(
    ("causal", "blocks"), [(True, BlockSizes(128, 256, 2, 1)), (False, BlockSizes(128, 128, 1, 1))]
)
def test_equal_to_dense_against_more_keys_in_any_order(causal, blocks):
    """Queries continue segments whose keys lie in any order, with slots given up in between."""
    rng = np.random.default_rng(0)
    kv = labels_of([70, 2, 101, 50, 90], 384)
    order = rng.permutation(384)
    kv = SegmentInfo(np.where(rng.random((1, 384)) < 0.3, 0, kv.segment_ids)[:, order], kv.positions[:, order])
    picked = rng.integers(0, 384, 150)
    q = SegmentInfo(kv.segment_ids[:, picked], kv.positions[:, picked])
    assert_equal_to_dense(blocks, random_qkv(1, 150, 384, 4, 2, 16), q, kv, causal)


def test_equal_to_dense_with_the_blocks_of_the_table():
    """One block, shorter than the table's."""
    labels = labels_of([20, 60], 90)
    assert_equal_to_dense(None, random_qkv(1, 90, 90, 4, 2, 16), labels, labels, True)


def test_rows_one_after_another_when_their_schedule_is_too_long(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "fits_schedule", lambda rows, *counts: asked.append(rows) or rows == 1)
    labels = rows_of(labels_of([100, 90], 200), labels_of([150], 200))
    # Blocks that no other test has, for the compiled function must be new.
    assert_equal_to_dense(BlockSizes(128, 256, 1, 1), random_qkv(2, 200, 200, 2, 1, 16), labels, labels, True)
    assert asked == [2, 2]


def test_blocks_that_share_nothing_are_not_read():
    """The keys and queries of a block that nobody visits may be anything."""
    blocks = BlockSizes(128, 128, 1, 1)
    labels = labels_of([128, 128, 128], 384)
    qkv = random_qkv(1, 384, 384, 2, 1, 16)
    clean = value_and_gradients(interpreted(blocks), *qkv, labels, labels, False)
    broken = [x.at[:, 128:256].set(np.nan) for x in qkv]
    for ours, theirs in zip(
        jax.tree.leaves(value_and_gradients(interpreted(blocks), *broken, labels, labels, False)),
        jax.tree.leaves(clean),
        strict=True,
    ):
        np.testing.assert_array_equal(np.delete(ours, range(128, 256), 1), np.delete(theirs, range(128, 256), 1))
        assert np.all(np.isnan(ours[:, 128:256]))


def visited(plan, rows, outer_count, inner_count):
    """The pairs of a schedule as [rows, outer_count, inner_count] counts, and the outer blocks in order."""
    pairs = np.asarray(plan.pairs[: plan.count])
    outer, inner = pairs >> 16, pairs & 0xFFFF
    np.testing.assert_array_equal(outer // outer_count, inner // inner_count)
    found = np.zeros((rows, outer_count, inner_count), int)
    np.add.at(found, (outer // outer_count, outer % outer_count, inner % inner_count), 1)
    return found, outer


def test_the_schedule_is_the_active_pairs_and_one_of_each_idle_block():
    rng = np.random.default_rng(0)
    active = rng.random((3, 7, 5)) < 0.3
    active[1] = False
    active[0, 2] = False
    expected = active.copy()
    expected[..., 0] |= ~active.any(-1)
    found, outer = visited(pair_schedule(jnp.asarray(active)), 3, 7, 5)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(outer, np.sort(outer))
    assert pair_schedule(jnp.asarray(active)).pairs[-1] == -1


def test_frames_are_visited_alone():
    """160 frames of one block each: 160 visits, not 25,600."""
    frames = labels_of([256] * 160, 40_960)
    assert pair_schedule(active_blocks(frames, frames, 256, 256, causal=False)).count == 160


def test_a_schedule_fits_or_not():
    assert fits_schedule(5, 160, 160)  # five tower rows of 40,960 patches
    assert not fits_schedule(6, 160, 160)
    assert not fits_schedule(32_768, 1, 1)
    assert not fits_schedule(32_768, 1, 2)


def test_in_a_ring():
    """A slice's softmax denominators are merged with those of others, and its backward pass takes those of all."""
    mesh = make_mesh({"context": 2}, jax.devices()[:2])
    labels = labels_of([60, 110], 256)
    backend = tpu_backend(BlockSizes(128, 128, 2, 1), interpret=True)

    def in_a_ring(*operands, causal, scale):
        rows, scalars = PartitionSpec(None, "context"), PartitionSpec(None, "context")
        run = functools.partial(ring_attention, causal=causal, scale=scale, axis="context", local=backend)
        return jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(rows, rows, rows, SegmentInfo(scalars, scalars), SegmentInfo(scalars, scalars)),
            out_specs=rows,
            check_vma=False,
        )(*operands)

    qkv = random_qkv(1, 256, 256, 4, 2, 16)
    ours = value_and_gradients(in_a_ring, *qkv, labels, labels, True)
    dense = value_and_gradients(dense_attention, *qkv, labels, labels, True)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(one, other, atol=ATTENTION, rtol=ATTENTION)
