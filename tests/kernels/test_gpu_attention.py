"""Tests the GPU kernels against dense attention, interpreted without a GPU, and lowers them for CUDA at full size."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.attention import attention_of, cast, make_segment_info, random_inputs, stack_rows, value_and_gradients
from support.tolerances import ATTENTION, ATTENTION_BFLOAT16
from vl3_jax.kernels import dispatch
from vl3_jax.kernels import gpu_attention as kernels
from vl3_jax.kernels.backend import AttentionInputs, attend
from vl3_jax.kernels.blockwise import BLOCKWISE
from vl3_jax.kernels.dense import dense_attention
from vl3_jax.kernels.segment_info import SegmentInfo, active_block_schedule, active_blocks

run_kernels = attention_of(kernels.gpu_backend(interpret=jax.default_backend() != "gpu"))
TOLERANCE = {"float32": ATTENTION, "bfloat16": ATTENTION_BFLOAT16}


def assert_equal_to_dense(inputs):
    dtype = inputs.q.dtype
    out, gradients = value_and_gradients(run_kernels, inputs)
    expected, expected_gradients = value_and_gradients(dense_attention, cast(inputs, jnp.float32))
    assert {x.dtype for x in (out, *gradients)} == {dtype}
    for ours, dense in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        ours = ours.astype(jnp.float32)
        np.testing.assert_allclose(ours, dense, atol=TOLERANCE[dtype.name], rtol=TOLERANCE[dtype.name])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(2, 2, 72), (6, 2, 128)])
@pytest.mark.parametrize("causal", [False, True])
def test_equal_to_dense(heads, kv_heads, width, causal, dtype):
    rows = [([90, 5, 60], False), ([], False), ([170], True)]
    info = stack_rows(*(make_segment_info(lengths, 200, padding_first) for lengths, padding_first in rows))
    assert_equal_to_dense(random_inputs(heads, kv_heads, width, info, causal=causal, dtype=dtype))


@pytest.mark.parametrize("seed", range(2))
def test_equal_to_dense_against_other_keys_in_any_order(seed):
    rng = np.random.default_rng(seed)
    kv_info = make_segment_info([70, 2, 1, 50, 90], 250)
    order = rng.permutation(250)
    segment_ids = np.where(rng.random((1, 250)) < 0.3, 0, kv_info.segment_ids)
    kv_info = SegmentInfo(segment_ids[:, order], kv_info.positions[:, order])
    indices = rng.integers(0, 250, 40)
    q_info = SegmentInfo(kv_info.segment_ids[:, indices], kv_info.positions[:, indices])
    assert_equal_to_dense(random_inputs(2, 1, 16, q_info, kv_info, causal=True, seed=seed))


def test_inactive_blocks_are_not_read(monkeypatch):
    """Keys and queries of a block without active pairs may be anything, and their gradients are zeros."""
    monkeypatch.setattr(kernels, "FORWARD", {4: kernels.Tiles(32, 32, 1, 1)})
    monkeypatch.setattr(kernels, "BACKWARD", {4: kernels.Tiles(32, 32, 1, 1)})
    q_info = make_segment_info([32, 32, 32], 96)
    kv_info = SegmentInfo(np.where(q_info.segment_ids == 2, 9, q_info.segment_ids), q_info.positions)
    inputs = random_inputs(2, 1, 16, q_info, kv_info, causal=False)
    q, k, v = (x.at[:, 32:64].set(np.nan) for x in (inputs.q, inputs.k, inputs.v))
    out, gradients = value_and_gradients(run_kernels, inputs.replace(q=q, k=k, v=v))
    for array in (out, *gradients):
        assert np.all(np.isfinite(array))
        assert not np.any(array[:, 32:64])
        assert np.any(array[:, :32])
        assert np.any(array[:, 64:])


def test_schedule_of_keys_is_that_of_queries_transposed():
    info = make_segment_info([100, 28, 128], 256)
    active = active_blocks(info, info, 64, 32, causal=True)
    by_q, by_kv = active_block_schedule(active), active_block_schedule(active.swapaxes(1, 2))
    pairs = {(i, int(j)) for i in range(4) for j in by_q.order[0, i, : by_q.count[0, i]]}
    assert pairs == {(int(i), j) for j in range(8) for i in by_kv.order[0, j, : by_kv.count[0, j]]}
    assert pairs == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (3, 4), (3, 5), (3, 6), (3, 7)}


class FakeGpu(NamedTuple):
    """The properties of a GPU that are known while tracing."""

    compute_capability: str
    platform: str = "gpu"


@pytest.mark.parametrize(
    ("capability", "width", "dtypes", "reason"),
    [
        ("9.0", 72, (jnp.bfloat16,) * 3, None),
        ("8.0", 128, (jnp.float32,) * 3, None),
        ("7.5", 72, (jnp.bfloat16,) * 3, "compute capability 7.5"),
        ("gfx942", 72, (jnp.bfloat16,) * 3, "compute capability gfx942"),
        ("9.0", 256, (jnp.bfloat16,) * 3, "256 channels"),
        ("9.0", 72, (jnp.float32, jnp.bfloat16, jnp.bfloat16), "bfloat16 and float32"),
    ],
)
def test_unsupported_operands_use_plain_jax(capability, width, dtypes, reason, monkeypatch):
    for module in (dispatch, kernels):
        monkeypatch.setattr(module, "target_device", lambda: FakeGpu(capability))
    q, k, v = (jax.ShapeDtypeStruct((1, 512, 4, width), dtype) for dtype in dtypes)
    info = SegmentInfo(*[jax.ShapeDtypeStruct((1, 512), jnp.int32)] * 2)
    inputs = AttentionInputs(q, k, v, info, info, causal=True, scale=1.0)
    unsupported_reason = kernels.gpu_unsupported_reason(inputs)
    assert unsupported_reason is None if reason is None else reason in unsupported_reason
    assert dispatch.select_backend(inputs) == (BLOCKWISE if reason else kernels.gpu_backend())


TRITON_CALL = "__gpu$xla.gpu.triton"
H200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")


def lowered_for_cuda(length, heads, kv_heads, width, causal, dtype) -> str:
    shape = jax.ShapeDtypeStruct

    def loss(q, k, v, info):
        inputs = AttentionInputs(q, k, v, info, info, causal=causal, scale=0.1)
        return jnp.sum(attend(kernels.gpu_backend(), inputs).astype(jnp.float32))

    q, kv = shape((1, length, heads, width), dtype), shape((1, length, kv_heads, width), dtype)
    info = SegmentInfo(*[shape((1, length), jnp.int32)] * 2)
    # One axis of one device: newer versions of jax read the kind of GPU from the mesh.
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (jax.sharding.AxisType.Explicit,), abstract_device=H200)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, kv, kv, info)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "width", "causal"),
    [(40_960, 16, 16, 72, False), (16_384, 12, 2, 128, True), (16_384, 28, 4, 128, True)],
)
def test_lowers_for_cuda_at_full_size(length, heads, kv_heads, width, causal, dtype):
    """There are three Triton kernels, no array of queries by keys, and no copy with wider heads."""
    text = lowered_for_cuda(length, heads, kv_heads, width, causal, dtype)
    for kernel in ("forward_kernel", "d_q_kernel", "d_kv_kernel"):
        assert text.count(f'name = "{kernel}"') == 1
    assert text.count(TRITON_CALL) == 3
    assert f"{length}x{length}" not in text
    assert f"x{length}x{heads}x128x" not in text or width == 128


@pytest.mark.parametrize(("dtype", "precision"), [(jnp.float32, "ieee"), (jnp.bfloat16, "tf32")])
def test_float32_is_multiplied_in_float32(dtype, precision, monkeypatch):
    """Checks the Triton program; "tf32" is its default, which has no effect on bfloat16."""
    registration = pytest.importorskip("jax._src.pallas.triton.pallas_call_registration")
    lower, programs = registration.lowering.lower_jaxpr_to_triton_module, []

    def recording_lower(*arguments, **options):
        result = lower(*arguments, **options)
        programs.append(result.module.operation.get_asm())
        return result

    monkeypatch.setattr(registration.lowering, "lower_jaxpr_to_triton_module", recording_lower)
    lowered_for_cuda(512, 4, 2, 128, True, dtype)
    products = [line for program in programs for line in program.splitlines() if "tt.dot" in line]
    assert len(products) == 2 + 3 + 4
    for line in products:
        assert ("inputPrecision = tf32" in line) == (precision == "tf32"), line
