"""Tests the interpreted kernels that bring heads into the layout of the TPU attention kernels and back."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.tolerances import ATTENTION
from vl3_jax.kernels.block_sizes import LANES
from vl3_jax.kernels.rotary import rotate
from vl3_jax.kernels.tpu_layout import heads_first, heads_first_with_delta, tokens_first


def random(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def rotary_table(tokens, width):
    angles = np.random.default_rng(0).uniform(0, 100, (tokens, width // 2))
    return jnp.asarray(np.concatenate([np.cos(angles), np.sin(angles)], -1), jnp.float32)


@settings(max_examples=5, deadline=None)
@given(heads=st.integers(1, 5), width=st.integers(1, LANES // 2).map(lambda half: 2 * half))
def test_windows_of_any_width_are_moved_exactly(heads, width):
    x = random(0, LANES, heads * width, dtype=jnp.bfloat16)
    moved = heads_first(x, heads, None, interpret=True)
    np.testing.assert_array_equal(moved[..., :width], x.reshape(LANES, heads, width).swapaxes(0, 1))
    assert not np.any(moved[..., width:])
    np.testing.assert_array_equal(tokens_first(moved, width, None, interpret=True), x)


@pytest.mark.parametrize(("heads", "width"), [(16, 72), (2, 128), (3, 24), (2, 256)])
def test_heads_are_rotated_and_rotated_back(heads, width):
    tokens = 512  # two blocks
    x, table = random(0, tokens, heads * width), rotary_table(tokens, width)
    rotated = heads_first(x, heads, table, interpret=True)
    expected = rotate(x.reshape(tokens, heads, width), table).swapaxes(0, 1)
    np.testing.assert_allclose(rotated[..., :width], expected, atol=ATTENTION, rtol=ATTENTION)
    assert not np.any(rotated[..., width:])
    np.testing.assert_allclose(tokens_first(rotated, width, table, interpret=True), x, atol=ATTENTION, rtol=ATTENTION)


def test_products_with_the_gradient_are_summed_by_head():
    heads, width = 3, 72
    out, d_out = random(0, LANES, heads * width), random(1, LANES, heads * width, dtype=jnp.bfloat16)
    moved, delta = heads_first_with_delta(d_out, out, heads, interpret=True)
    np.testing.assert_array_equal(moved, heads_first(d_out, heads, None, interpret=True))
    products = (out * d_out.astype(jnp.float32)).reshape(LANES, heads, width).sum(-1)
    np.testing.assert_allclose(delta[:, 0], products.T, atol=ATTENTION, rtol=ATTENTION)
