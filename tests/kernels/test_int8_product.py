"""Tests of products with int8 kernels: the two int8 parts of a CPU and of a TPU."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import tolerances
from vl3_jax.kernels import int8_product as module
from vl3_jax.kernels.int8_product import int8_product


def product(x, values, num_in):
    kernel = np.moveaxis(values, range(num_in), range(-num_in, 0))
    return np.asarray(int8_product(jnp.asarray(x), jnp.asarray(kernel), num_in))


@pytest.mark.parametrize(("num_in", "shape"), [(1, (48, 3, 5, 4)), (2, (6, 8, 20)), (1, (4096, 8))])
def test_equals_the_product_in_float64(num_in, shape):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, *shape[:num_in])).astype(np.float32)
    values = rng.integers(-127, 128, shape, np.int8)
    expected = np.tensordot(x.astype(np.float64), values, num_in)
    found = product(x, values, num_in)
    assert found.shape == expected.shape
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"largest difference {difference:.1e} of the largest value")
    assert difference < tolerances.INT8_PRODUCT


@pytest.mark.parametrize(
    ("kind", "rows", "whole", "parts"),
    [
        ("TPU v5 lite", 8, True, True),
        ("TPU v6 lite", 32, True, True),
        ("TPU v5 lite", 33, True, False),
        ("TPU v5 lite", 8, False, False),
        ("TPU7x", 8, True, False),  # its matrix unit takes no int8
    ],
)
def test_few_rows_on_a_tpu_are_multiplied_in_int8(kind, rows, whole, parts, monkeypatch):
    monkeypatch.setattr(module, "target_device", lambda: types.SimpleNamespace(platform="tpu", device_kind=kind))
    rng = np.random.default_rng(3)
    x, values = rng.standard_normal((rows, 1, 64)).astype(np.float32), rng.integers(-127, 128, (64, 32), np.int8)
    kernel = jnp.asarray(values.T)
    found = int8_product(jnp.asarray(x), kernel, 1, whole_inputs=whole)
    expected = x.astype(np.float64) @ values
    assert np.abs(found - expected).max() / np.abs(expected).max() < tolerances.INT8_PRODUCT
    program = str(jax.make_jaxpr(lambda x: int8_product(x, kernel, 1, whole))(x))
    assert ("i8[2," in program) == parts


def test_many_rows_equal_few():
    rng = np.random.default_rng(2)
    x, values = rng.standard_normal((300, 64)).astype(np.float32), rng.integers(-127, 128, (64, 32), np.int8)
    parts = [product(part, values, 1) for part in np.split(x, 20)]
    np.testing.assert_allclose(
        product(x, values, 1), np.concatenate(parts), rtol=tolerances.REORDERED, atol=tolerances.REORDERED
    )


def test_one_part_alone_would_show():
    rng = np.random.default_rng(1)
    x, values = rng.standard_normal((3, 64)).astype(np.float32), rng.integers(-127, 128, (64, 32), np.int8)
    step = np.abs(x).max(-1, keepdims=True) / 127
    coarse, exact = np.round(x / step) * step @ values.astype(np.float64), x.astype(np.float64) @ values
    assert np.abs(coarse - exact).max() / np.abs(exact).max() > 10 * tolerances.INT8_PRODUCT


def test_rows_are_scaled_apart_and_empty_ones_are_zero():
    values = np.full((8, 4), 127, np.int8)
    x = np.zeros((3, 8), np.float32)
    x[1], x[2] = 1e-20, 1e20
    np.testing.assert_allclose(product(x, values, 1), np.outer([0, 1e-20, 1e20], np.full(4, 1016)), rtol=1e-6)
