"""Tests blockwise attention against dense attention, forward and backward, over many layouts of segments."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.attention import (
    attention_of,
    cast,
    exact_attention,
    make_segment_info,
    random_inputs,
    stack_rows,
    value_and_gradients,
)
from support.tolerances import ATTENTION
from vl3_jax.kernels import blockwise
from vl3_jax.kernels.dense import dense_attention
from vl3_jax.kernels.dispatch import FEW_QUERIES
from vl3_jax.kernels.segment_info import SegmentInfo, active_block_schedule, active_blocks
from vl3_jax.model.attention import attention

blockwise_attention = attention_of(blockwise.BLOCKWISE)
LENGTH = 640  # two and a half blocks, so that segments end within and at the edge of blocks, and in padding


def assert_equal_to_dense(inputs):
    out, gradients = value_and_gradients(blockwise_attention, inputs)
    dense, dense_gradients = value_and_gradients(dense_attention, inputs)
    np.testing.assert_allclose(dense, exact_attention(inputs), atol=ATTENTION, rtol=0)
    np.testing.assert_allclose(out, dense, atol=ATTENTION, rtol=0)
    for gradient, dense_gradient in zip(gradients, dense_gradients, strict=True):
        np.testing.assert_allclose(gradient, dense_gradient, atol=ATTENTION, rtol=ATTENTION)


layouts = st.one_of(
    st.just([LENGTH]),  # one segment as long as the row
    st.lists(st.integers(1, 12), min_size=0, max_size=120),  # many short segments, or an empty row
    st.lists(st.integers(1, 400), min_size=1, max_size=4),
)


@settings(max_examples=25, deadline=None)
@given(layout=layouts, padding_first=st.booleans(), causal=st.booleans(), seed=st.integers(0, 99))
def test_blockwise_equals_dense_over_layouts(layout, padding_first, causal, seed):
    info = make_segment_info(layout, LENGTH, padding_first)
    assert_equal_to_dense(random_inputs(2, 1, 16, info, causal=causal, seed=seed))


@settings(max_examples=15, deadline=None)
@given(data=st.data(), causal=st.booleans(), seed=st.integers(0, 99))
def test_blockwise_equals_dense_for_a_cache_with_freed_slots(data, causal, seed):
    """Queries continue segments whose keys are in any order, with freed slots between them."""
    rng = np.random.default_rng(seed)
    kv_info = make_segment_info(data.draw(layouts), LENGTH)
    order = rng.permutation(LENGTH) if data.draw(st.booleans()) else np.arange(LENGTH)
    freed = rng.random(LENGTH) < data.draw(st.sampled_from([0.0, 0.3, 0.95]))
    kv_info = SegmentInfo(np.where(freed, 0, kv_info.segment_ids)[:, order], kv_info.positions[:, order])
    indices = rng.integers(0, LENGTH, 300)
    q_segment_ids = np.where(rng.random((1, 300)) < 0.2, 0, kv_info.segment_ids[:, indices])
    q_info = SegmentInfo(q_segment_ids, kv_info.positions[:, indices])
    assert_equal_to_dense(random_inputs(2, 1, 16, q_info, kv_info, causal=causal, seed=seed))


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(16, 16, 72), (12, 2, 128), (28, 4, 128)])
@pytest.mark.parametrize("causal", [False, True])
def test_blockwise_equals_dense_for_released_head_shapes(heads, kv_heads, width, causal):
    rows = [([300, 5, 90], False), ([], False), ([100], True)]
    info = stack_rows(*(make_segment_info(lengths, 420, padding_first) for lengths, padding_first in rows))
    assert_equal_to_dense(random_inputs(heads, kv_heads, width, info, causal=causal))


def test_queries_without_keys_give_zeros():
    inputs = random_inputs(2, 2, 16, make_segment_info([10], 300), causal=True)
    for function in (blockwise_attention, dense_attention):
        out, gradients = value_and_gradients(function, inputs)
        assert not np.any(out[:, 10:])
        assert all(not np.any(gradient[:, 10:]) and np.all(np.isfinite(gradient)) for gradient in gradients)


def test_only_blocks_that_share_a_segment_are_active():
    """64 frames of one block each have 64 active pairs instead of 4096; causal text has the lower triangle."""
    frames = make_segment_info([blockwise.BLOCK] * 64, 64 * blockwise.BLOCK)
    schedule = active_block_schedule(active_blocks(frames, frames, blockwise.BLOCK, blockwise.BLOCK, causal=False))
    np.testing.assert_array_equal(schedule.count, np.ones((1, 64)))
    np.testing.assert_array_equal(schedule.order[0, :, 0], np.arange(64))
    text = make_segment_info([8 * blockwise.BLOCK] * 2, 16 * blockwise.BLOCK)
    schedule = active_block_schedule(active_blocks(text, text, blockwise.BLOCK, blockwise.BLOCK, causal=True))
    np.testing.assert_array_equal(schedule.count[0], [*range(1, 9), *range(1, 9)])


def test_bfloat16_accumulates_in_float32():
    inputs = random_inputs(4, 2, 64, make_segment_info([200, 100], 300), causal=True, dtype=jnp.bfloat16)
    out = blockwise_attention(inputs)
    assert out.dtype == jnp.bfloat16
    exact = exact_attention(cast(inputs, jnp.float32))
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=2e-2)


def test_causal_attention_without_positions_is_refused():
    segment = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(TypeError, match="positions"):
        attention(random_inputs(2, 2, 8, SegmentInfo(segment), causal=True))


def test_few_queries_use_the_dense_product():
    few = FEW_QUERIES
    kv_info = make_segment_info([300], 300)
    q_info = SegmentInfo(kv_info.segment_ids[:, -few:], kv_info.positions[:, -few:])
    inputs = random_inputs(2, 2, 16, q_info, kv_info, causal=True)
    np.testing.assert_allclose(attention(inputs), exact_attention(inputs), atol=ATTENTION)
