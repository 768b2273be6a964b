"""Attention in blocks against dense attention, forward and backward, over layouts of every kind."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.attention import labels_of, oracle, random_qkv, value_and_gradients
from support.tolerances import ATTENTION
from vl3_jax.kernels import blockwise
from vl3_jax.kernels.blockwise import blockwise_attention
from vl3_jax.kernels.dense import dense_attention
from vl3_jax.kernels.dispatch import FEW_QUERIES
from vl3_jax.kernels.segment_info import SegmentInfo, active_block_schedule, active_blocks
from vl3_jax.model.attention import attention

LENGTH = 640  # two and a half blocks: inner edges, an outer edge and padding


def assert_equal_to_dense(qkv, q_info, kv_info, causal):
    out, gradients = value_and_gradients(blockwise_attention, *qkv, q_info, kv_info, causal)
    dense, dense_gradients = value_and_gradients(dense_attention, *qkv, q_info, kv_info, causal)
    np.testing.assert_allclose(dense, oracle(*qkv, q_info, kv_info, causal), atol=ATTENTION, rtol=0)
    np.testing.assert_allclose(out, dense, atol=ATTENTION, rtol=0)
    for ours, theirs in zip(gradients, dense_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=ATTENTION, rtol=ATTENTION)


layouts = st.one_of(
    st.just([LENGTH]),  # one huge segment
    st.lists(st.integers(1, 12), min_size=0, max_size=120),  # many tiny ones, or an empty row
    st.lists(st.integers(1, 400), min_size=1, max_size=4),
)


@settings(max_examples=25, deadline=None)
@given(layout=layouts, padding_first=st.booleans(), causal=st.booleans(), seed=st.integers(0, 99))
def test_blocks_equal_dense_over_layouts(layout, padding_first, causal, seed):
    labels = labels_of(layout, LENGTH, padding_first)
    assert_equal_to_dense(random_qkv(1, LENGTH, LENGTH, 2, 1, 16, seed), labels, labels, causal)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), causal=st.booleans(), seed=st.integers(0, 99))
def test_blocks_equal_dense_against_a_cache_with_holes(data, causal, seed):
    """Queries continue segments whose keys lie in any order, with slots given up in between."""
    rng = np.random.default_rng(seed)
    kv = labels_of(data.draw(layouts), LENGTH)
    order = rng.permutation(LENGTH) if data.draw(st.booleans()) else np.arange(LENGTH)
    holes = rng.random(LENGTH) < data.draw(st.sampled_from([0.0, 0.3, 0.95]))
    kv = SegmentInfo(np.where(holes, 0, kv.segment_ids)[:, order], kv.positions[:, order])
    queries = rng.integers(0, LENGTH, 300)
    q = SegmentInfo(np.where(rng.random((1, 300)) < 0.2, 0, kv.segment_ids[:, queries]), kv.positions[:, queries])
    assert_equal_to_dense(random_qkv(1, 300, LENGTH, 2, 1, 16, seed), q, kv, causal)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(16, 16, 72), (12, 2, 128), (28, 4, 128)])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_equal_dense_in_the_released_shapes(heads, kv_heads, width, causal):
    rows = [labels_of([300, 5, 90], 420), labels_of([], 420), labels_of([100], 420, padding_first=True)]
    labels = SegmentInfo(*(np.concatenate(x) for x in zip(*rows, strict=True)))
    assert_equal_to_dense(random_qkv(3, 420, 420, heads, kv_heads, width), labels, labels, causal)


def test_rows_without_anything_to_see_are_zero():
    qkv = random_qkv(1, 300, 300, 2, 2, 16)
    labels = labels_of([10], 300)
    for backend in (blockwise_attention, dense_attention):
        out, gradients = value_and_gradients(backend, *qkv, labels, labels, True)
        assert not np.any(out[:, 10:])
        assert all(not np.any(gradient[:, 10:]) and np.all(np.isfinite(gradient)) for gradient in gradients)


def test_only_blocks_that_share_a_segment_are_visited():
    """64 frames of one block each: 64 pairs of blocks instead of 4096; causal text: the lower triangle."""
    frames = labels_of([blockwise.BLOCK] * 64, 64 * blockwise.BLOCK)
    pairs = active_block_schedule(active_blocks(frames, frames, blockwise.BLOCK, blockwise.BLOCK, causal=False))
    np.testing.assert_array_equal(pairs.count, np.ones((1, 64)))
    np.testing.assert_array_equal(pairs.order[0, :, 0], np.arange(64))
    text = labels_of([8 * blockwise.BLOCK] * 2, 16 * blockwise.BLOCK)
    pairs = active_block_schedule(active_blocks(text, text, blockwise.BLOCK, blockwise.BLOCK, causal=True))
    np.testing.assert_array_equal(pairs.count[0], [*range(1, 9), *range(1, 9)])


def test_bfloat16_accumulates_in_float32():
    qkv = random_qkv(1, 300, 300, 4, 2, 64)
    labels = labels_of([200, 100], 300)
    low = [x.astype(jnp.bfloat16) for x in qkv]
    out = blockwise_attention(*low, labels, labels, causal=True, scale=64**-0.5)
    assert out.dtype == jnp.bfloat16
    exact = oracle(*(np.asarray(x, np.float32) for x in low), labels, labels, True)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=2e-2)


def test_causal_attention_asks_for_positions():
    q, k, v = random_qkv(1, 4, 4, 2, 2, 8)
    segment = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="positions"):
        attention(q, k, v, segment, segment, causal=True)


def test_few_queries_take_the_dense_product():
    few = FEW_QUERIES
    labels = labels_of([300], 300)
    q, k, v = random_qkv(1, few, 300, 2, 2, 16)
    q_info = SegmentInfo(labels.segment_ids[:, -few:], labels.positions[:, -few:])
    out = attention(q, k, v, q_info.segment_ids, labels.segment_ids, q_info.positions, labels.positions, causal=True)
    np.testing.assert_allclose(out, oracle(q, k, v, q_info, labels, True), atol=ATTENTION)
