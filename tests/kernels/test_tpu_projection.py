"""The TPU kernel that projects tokens to rotated heads, interpreted on the CPU, equals the product and the rotation."""

import jax.numpy as jnp
import numpy as np
import pytest

from support.tolerances import REORDERED, relative_error
from vl3_jax.kernels.einsum import einsum
from vl3_jax.kernels.rotary import rotate
from vl3_jax.kernels.tpu_projection import tpu_projection, tpu_projection_unsupported_reason

WIDTH, HEAD_DIM = 64, 256


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(("maps", "others"), [(1, 0), (3, 128), (2, 256), (2, 0)])
def test_rotated_heads(heads, maps, others):
    """Maps are rotated and the others are not; positions of maps are those of all rows."""
    count = maps * 128
    x, kernel, bias, rotary, in_maps, elsewhere = arrays(
        (2, count + others, WIDTH), (WIDTH, heads, HEAD_DIM), (heads, HEAD_DIM), (128, HEAD_DIM), (count, WIDTH),
        (2, others, WIDTH),
    )  # fmt: skip
    placed = x + jnp.concatenate([jnp.stack([in_maps, in_maps]), elsewhere], axis=1)
    expected = einsum("bli,ihd->blhd", placed, kernel) + bias
    rotated = rotate(expected[:, :count], jnp.tile(rotary, (maps, 1)))
    expected = jnp.concatenate([rotated, expected[:, count:]], axis=1)
    ours = tpu_projection(x, kernel, bias, rotary, in_maps, elsewhere, interpret=True)
    assert relative_error(ours, expected) <= REORDERED


def test_heads_alone():
    x, kernel, bias, rotary = arrays((2, 384, WIDTH), (WIDTH, 1, HEAD_DIM), (1, HEAD_DIM), (384, HEAD_DIM))
    expected = einsum("bli,ihd->blhd", x, kernel) + bias
    assert relative_error(tpu_projection(x, kernel, bias, interpret=True), expected) <= REORDERED
    ours = tpu_projection(x, kernel, bias, rotary, interpret=True)
    assert relative_error(ours, rotate(expected, rotary)) <= REORDERED


def test_what_is_not_supported():
    x, kernel, narrow = arrays((1, 200, WIDTH), (WIDTH, 1, HEAD_DIM), (WIDTH, 2, 64))
    assert "200 tokens" in tpu_projection_unsupported_reason(x, kernel, None)
    assert "2 heads of 64" in tpu_projection_unsupported_reason(x, narrow, None)
    assert "float16" in tpu_projection_unsupported_reason(x.astype(jnp.float16), kernel, None)
