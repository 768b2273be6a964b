"""Tests which attention is selected for which device and operands, and what is logged."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from support.attention import make_segment_info, random_inputs
from vl3_jax.kernels import dispatch
from vl3_jax.kernels.backend import AttentionInputs, Backend
from vl3_jax.kernels.block_sizes import BlockSizes, tpu_blocks
from vl3_jax.kernels.blockwise import BLOCKWISE
from vl3_jax.kernels.dispatch import FEW_QUERIES, local_attention, select_backend
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.kernels.tpu_attention import tpu_backend
from vl3_jax.model.attention import attention
from vl3_jax.parallel.rules import target_device


def tracing_for(device_kind: str, platform: str = "tpu"):
    """Returns a context that traces for a mesh of such devices, which need not be attached."""
    device = AbstractDevice(device_kind=device_kind, num_cores=1, platform=platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device))


def shapes(length, heads, kv_heads, width, dtype=jnp.bfloat16, kv_dtype=None, causal=True) -> AttentionInputs:
    q = jax.ShapeDtypeStruct((1, length, heads, width), dtype)
    kv = jax.ShapeDtypeStruct((1, length, kv_heads, width), kv_dtype or dtype)
    info = SegmentInfo(*[jax.ShapeDtypeStruct((1, length), jnp.int32)] * 2)
    return AttentionInputs(q, kv, kv, info, info, causal=causal, scale=1.0)


TOWER, TEXT = shapes(40_960, 16, 16, 72, causal=False), shapes(16_384, 12, 2, 128)


def test_selection_by_platform():
    assert select_backend(TEXT) is BLOCKWISE
    with tracing_for("TPU v5 lite"):
        assert select_backend(TEXT) is tpu_backend()
        assert select_backend(TOWER) is tpu_backend()


def test_target_device_is_that_of_the_mesh_or_the_default():
    assert target_device().platform == "cpu"
    with tracing_for("TPU v6 lite"):
        assert (target_device().platform, target_device().device_kind) == ("tpu", "TPU v6 lite")
    for default in ("cpu", jax.devices()[1]):
        with jax.default_device(default):
            assert target_device() == (jax.devices()[0] if default == "cpu" else default)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (shapes(4096, 8, 8, 192), "heads of 192 channels"),
        (shapes(4096, 64, 1, 128), "64 heads on 1"),
        (shapes(1_000_000, 2, 1, 128), "rows of 1000000 queries and 1000000 keys"),
        (shapes(4096, 2, 1, 128, jnp.float16), "operands of float16"),
        (shapes(64, 2, 1, 16, jnp.float32, jnp.bfloat16), "operands of bfloat16 and float32"),
    ],
)
def test_unsupported_operands_are_logged_once(inputs, reason, caplog):
    dispatch._warn_once.cache_clear()
    with tracing_for("TPU v5 lite"), caplog.at_level(logging.WARNING):
        assert select_backend(inputs) is BLOCKWISE
        assert select_backend(inputs) is BLOCKWISE
    assert len(caplog.records) == 1
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("device_kind", "inputs", "blocks"),
    [
        ("TPU v5 lite", TOWER, BlockSizes(256, 256, 8, 4)),
        ("TPU v6 lite", TOWER, BlockSizes(256, 256, 16, 4)),
        ("TPU v5", TEXT, BlockSizes(512, 512, 1, 2)),
        ("TPU v5", shapes(16_384, 28, 4, 128), BlockSizes(512, 512, 1, 2)),
        ("TPU v5", shapes(16_384, 28, 4, 128, jnp.float32), BlockSizes(256, 512, 1, 2)),
        ("TPU v5", shapes(16_384, 1, 1, 128), BlockSizes(512, 512, 1, 1)),
        (
            "TPU v5",
            shapes(600, 16, 16, 72, causal=False),
            BlockSizes(256, 256, 8, 4),
        ),  # three blocks, 168 of padding
        ("TPU v5", shapes(513, 12, 2, 128), BlockSizes(384, 384, 1, 2)),  # two blocks, not 1024 tokens
        ("TPU v5", shapes(40_960, 6, 6, 72, causal=False), BlockSizes(256, 256, 6, 4)),
        ("TPU v5 lite", shapes(4096, 1, 1, 256, causal=False), BlockSizes(512, 512, 1, 1)),
        ("TPU v5 lite", shapes(4096, 8, 1, 256), BlockSizes(256, 512, 1, 1)),
    ],
)
def test_block_sizes(device_kind, inputs, blocks):
    with tracing_for(device_kind):
        assert tpu_blocks(inputs) == blocks


def test_an_explicit_backend():
    """It takes precedence over the selection, also for a few queries."""
    calls = []

    def forward(inputs, dtype):
        calls.append({"causal": inputs.causal, "scale": inputs.scale})
        return BLOCKWISE.forward(inputs, dtype=dtype)

    backend = Backend(forward, BLOCKWISE.backward)
    inputs = random_inputs(2, 1, 16, make_segment_info([FEW_QUERIES], FEW_QUERIES), causal=True)
    expected = local_attention(inputs)
    assert not calls
    ours = attention(inputs, backend=backend)
    assert calls == [{"causal": True, "scale": 0.25}]
    np.testing.assert_allclose(ours, expected, atol=1e-6)
