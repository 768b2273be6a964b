"""Tests which attention is selected for which device and operands, and what is logged."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from support.attention import make_segment_info, random_qkv
from vl3_jax.kernels import dispatch
from vl3_jax.kernels.backend import Backend
from vl3_jax.kernels.block_sizes import BlockSizes, tpu_blocks
from vl3_jax.kernels.blockwise import BLOCKWISE
from vl3_jax.kernels.dispatch import FEW_QUERIES, local_attention, select_backend
from vl3_jax.kernels.tpu_attention import tpu_backend
from vl3_jax.model.attention import attention
from vl3_jax.parallel.rules import target_device


def tracing_for(device_kind: str, platform: str = "tpu"):
    """Returns a context that traces for a mesh of such devices, which need not be attached."""
    device = AbstractDevice(device_kind=device_kind, num_cores=1, platform=platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device))


def shapes(length, heads, kv_heads, width, dtype=jnp.bfloat16):
    q, k = (jax.ShapeDtypeStruct((1, length, n, width), dtype) for n in (heads, kv_heads))
    return q, k, k


TOWER, TEXT = shapes(40_960, 16, 16, 72), shapes(16_384, 12, 2, 128)


def test_selection_by_platform():
    assert select_backend(*TEXT, True) is BLOCKWISE
    with tracing_for("TPU v5 lite"):
        assert select_backend(*TEXT, True) is tpu_backend()
        assert select_backend(*TOWER, False) is tpu_backend()


def test_target_device_is_that_of_the_mesh_or_the_default():
    assert target_device().platform == "cpu"
    with tracing_for("TPU v6 lite"):
        assert (target_device().platform, target_device().device_kind) == ("tpu", "TPU v6 lite")
    for default in ("cpu", jax.devices()[1]):
        with jax.default_device(default):
            assert target_device() == (jax.devices()[0] if default == "cpu" else default)


@pytest.mark.parametrize(
    ("operands", "reason"),
    [
        (shapes(4096, 8, 8, 256), "heads of 256 channels"),
        (shapes(4096, 64, 1, 128), "64 heads on 1"),
        (shapes(1_000_000, 2, 1, 128), "rows of 1000000 queries and 1000000 keys"),
        (shapes(4096, 2, 1, 128, jnp.float16), "operands of float16"),
        ((shapes(64, 2, 1, 16, jnp.float32)[0], *shapes(64, 2, 1, 16)[1:]), "operands of bfloat16 and float32"),
    ],
)
def test_unsupported_operands_are_logged_once(operands, reason, caplog):
    dispatch._warn_once.cache_clear()
    with tracing_for("TPU v5 lite"), caplog.at_level(logging.WARNING):
        assert select_backend(*operands, True) is BLOCKWISE
        assert select_backend(*operands, True) is BLOCKWISE
    assert len(caplog.records) == 1
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("device_kind", "operands", "causal", "blocks"),
    [
        ("TPU v5 lite", TOWER, False, BlockSizes(256, 256, 8, 4)),
        ("TPU v6 lite", TOWER, False, BlockSizes(256, 256, 16, 4)),
        ("TPU v5", TEXT, True, BlockSizes(512, 512, 1, 2)),
        ("TPU v5", shapes(16_384, 28, 4, 128), True, BlockSizes(512, 512, 1, 2)),
        ("TPU v5", shapes(16_384, 28, 4, 128, jnp.float32), True, BlockSizes(256, 512, 1, 2)),
        ("TPU v5", shapes(16_384, 1, 1, 128), True, BlockSizes(512, 512, 1, 1)),
        ("TPU v5", shapes(600, 16, 16, 72), False, BlockSizes(256, 256, 8, 4)),  # three blocks, 168 tokens of padding
        ("TPU v5", shapes(513, 12, 2, 128), True, BlockSizes(384, 384, 1, 2)),  # two blocks, not 1024 tokens
        ("TPU v5", shapes(40_960, 6, 6, 72), False, BlockSizes(256, 256, 6, 4)),
    ],
)
def test_block_sizes(device_kind, operands, causal, blocks):
    with tracing_for(device_kind):
        assert tpu_blocks(*operands[:2], causal) == blocks


def test_an_explicit_backend():
    """It takes precedence over the selection, also for a few queries."""
    calls = []

    def forward(*operands, dtype, **options):
        calls.append(options)
        return BLOCKWISE.forward(*operands, dtype=dtype, **options)

    backend = Backend(forward, BLOCKWISE.backward)
    info = make_segment_info([FEW_QUERIES], FEW_QUERIES)
    q, k, v = random_qkv(1, FEW_QUERIES, FEW_QUERIES, 2, 1, 16)
    expected = local_attention(q, k, v, info, info, causal=True, scale=0.25)
    assert not calls
    segments, positions = [info.segment_ids] * 2, [info.positions] * 2
    ours = attention(q, k, v, *segments, *positions, causal=True, backend=backend)
    assert calls == [{"causal": True, "scale": 0.25}]
    np.testing.assert_allclose(ours, expected, atol=1e-6)
