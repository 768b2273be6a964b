"""The TPU kernel of depthwise convolutions, interpreted on the CPU, equals the compiler's convolution."""

import jax.numpy as jnp
import numpy as np
import pytest

from support.tolerances import REORDERED, relative_error
from vl3_jax.kernels.einsum import convolve
from vl3_jax.kernels.tpu_depthwise import tpu_depthwise, tpu_depthwise_unsupported_reason


@pytest.mark.parametrize("size", [3, 7])
@pytest.mark.parametrize("shape", [(2, 6, 8, 128), (1, 9, 16, 256)])
def test_each_channel_has_its_kernel(shape, size):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(s, np.float32)) for s in (shape, (size, size, 1, shape[3])))
    expected = convolve(x, kernel, padding=size // 2, groups=shape[3])
    assert relative_error(tpu_depthwise(x, kernel, interpret=True), expected) <= REORDERED


@pytest.mark.parametrize("shape", [(1, 8, 8, 64), (1, 8, 6, 128), (1, 512, 512, 128)])
def test_what_is_not_supported(shape):
    x, kernel = jnp.zeros(shape, jnp.bfloat16), jnp.zeros((7, 7, 1, shape[3]))
    assert tpu_depthwise_unsupported_reason(x, kernel) == f"maps of {shape[1]} x {shape[2]} x {shape[3]}"
