"""Maps whose pixels are channels of cells: the same convolutions and normalisations; and orders of cells."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.tolerances import REORDERED, relative_error
from vl3_jax.kernels.einsum import convolve
from vl3_jax.model.layers import LayerNorm
from vl3_jax.sam2.cell_order import cells_of, map_of, max_pool
from vl3_jax.sam2.hiera import Hiera
from vl3_jax.sam2.packed_maps import HalvingConv, PackedNorm, packed
from vl3_jax.sam2.sam2_config import HieraConfig

GRID = 4


def random_map(side: int, channels: int, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, side, side, channels)), dtype)


def random_params(module, x):
    params = nn.unbox(module.init(jax.random.key(0), x)["params"])
    return {name: jax.random.normal(jax.random.key(1), leaf.shape) for name, leaf in params.items()}


@pytest.mark.parametrize(("side", "channels"), [(16, 1), (8, 3), (2, 5)])
def test_convolutions_of_packed_maps(side, channels):
    x, conv = random_map(GRID * side, channels), HalvingConv((channels, 4 * channels), side)
    params = random_params(conv, packed(x, GRID))
    expected = packed(convolve(x, params["kernel"], stride=2, padding=1) + params["bias"], GRID)
    ours = jax.jit(conv.apply)({"params": params}, packed(x, GRID))
    assert relative_error(ours, expected) <= REORDERED


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_normalisations_of_packed_maps(dtype):
    x = random_map(4 * GRID, 8, dtype) + 1
    norm = LayerNorm(1e-6, None)
    params = random_params(norm, x)
    expected = packed(norm.apply({"params": params}, x), GRID)
    ours = PackedNorm(8, 1e-6).apply({"params": params}, packed(x, GRID))
    assert ours.dtype == dtype
    assert relative_error(ours.astype(jnp.float32), expected.astype(jnp.float32)) <= (
        REORDERED if dtype == jnp.float32 else 2**-8
    )


@pytest.mark.parametrize("groups", [(24,), (8,), (12, 4), (12, 4, 2), (6, 2), (7,)])
def test_orders_of_cells(groups):
    """Squares of squares come together, pooling keeps the order, and maps are found again."""
    x = random_map(24, 3)
    cells = cells_of(x, groups)
    np.testing.assert_array_equal(map_of(cells, 24, groups), x)
    if len(groups) > 1:
        outer = cells_of(x, groups[:1]).reshape(-1, groups[0], groups[0], 3)
        np.testing.assert_array_equal(cells, cells_of(outer, groups[1:]).reshape(cells.shape))
    if groups[-1] % 2 == 0:
        pooled = tuple(group // 2 for group in groups if group > 2)
        np.testing.assert_array_equal(map_of(max_pool(cells, groups[-1]), 12, pooled), nn.max_pool(x, (2, 2), (2, 2)))


@pytest.mark.slow
def test_windows_within_those_of_a_later_stage(monkeypatch):
    """The order of the trunk's cells changes nothing."""
    trunk = Hiera(HieraConfig((8, 16, 32, 64), (1, 2, 4, 8), (1, 2, 2, 1), (8, 4, 6, 3), (4,)))
    pixels = random_map(192, 3)
    features = lambda trunk, pixels: [stage.maps() for stage in trunk(pixels, trunk.positions(48))]  # noqa: E731
    params = nn.unbox(trunk.init(jax.random.key(0), pixels, method=features))
    nested = jax.jit(functools.partial(trunk.apply, method=features))(params, pixels)
    assert Hiera._first_groups(trunk, 48) == (24, 8)
    monkeypatch.setattr(Hiera, "_first_groups", lambda *_: (8,))
    plain = jax.jit(functools.partial(trunk.apply, method=features))(params, pixels)
    for first, second in zip(nested, plain, strict=True):
        assert relative_error(first, second) <= REORDERED
