"""Compiles the TPU kernels at full size, forward and backward, with the TPU compiler and without a TPU."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from support.compiler import needs_compiler
from vl3_jax.kernels.backend import AttentionInputs
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.kernels.tpu_depthwise import tpu_depthwise
from vl3_jax.kernels.tpu_projection import tpu_projection
from vl3_jax.model.attention import attention
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.rules import on_each_device
from vl3_jax.parallel.topologies import parse_topology
from vl3_jax.planning import compiler

pytestmark = needs_compiler

SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# heads, key/value heads, channels, tokens, causal
TOWER, TEXT_2B, TEXT_7B = (16, 16, 72, 40_960, False), (12, 2, 128, 16_384, True), (28, 4, 128, 16_384, True)
WIDE = (8, 1, 256, 16_384, True)


def compiled_text(generation, heads, kv_heads, width, length, causal, rows=1, context=1, dtype=jnp.bfloat16):
    """Compiles output and gradients for four chips with `rows` rows on each chip, or on each `context` chips."""
    mesh = make_mesh({"fsdp": -1, "context": context}, compiler.topology_devices(parse_topology(SLICES[generation])))
    split = NamedSharding(mesh, PartitionSpec("fsdp", "context"))

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct((rows * mesh.shape["fsdp"], length, *sizes), dtype, sharding=split)

    def run(q, k, v, segment_ids, positions, rotary, d_out):
        info = SegmentInfo(segment_ids, positions)

        def attend(q, k, v):
            inputs = AttentionInputs(q, k, v, info, info, causal=causal, scale=width**-0.5, rotary=rotary)
            return attention(inputs)

        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(d_out)

    q, k, info = shape(heads, width), shape(kv_heads, width), shape(dtype=jnp.int32)
    rotary = shape(width, dtype=jnp.float32)
    with jax.set_mesh(mesh), compiler.quiet():
        return jax.jit(run).lower(q, k, k, info, info, rotary, q).compile().as_text()


def assert_runs_kernels(text, times=1):
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    names = collections.Counter(re.match(r"\s*(?:ROOT )?%([a-z_]*kernel)", line)[1] for line in calls)
    assert names["forward_kernel"] == names["d_q_kernel"] == names["d_kv_kernel"] == times
    # Queries, keys and values on the way there, in one or both passes; the output and three gradients on the way back.
    assert names["heads_first_kernel"] in (3 * times, 6 * times)
    assert names["tokens_first_kernel"] == 4 * times
    assert names["heads_first_with_delta_kernel"] == times
    assert len(names) == 6


@pytest.mark.parametrize(
    ("generation", "shape"),
    [
        ("v5e", TEXT_2B),
        pytest.param("v5e", TOWER, marks=pytest.mark.slow),
        pytest.param("v5e", TEXT_7B, marks=pytest.mark.slow),
        pytest.param("v5e", WIDE, marks=pytest.mark.slow),
        *(
            pytest.param(generation, shape, marks=pytest.mark.slow)
            for generation in ("v5p", "v6e")
            for shape in (TOWER, TEXT_2B, TEXT_7B, WIDE)
        ),
    ],
)
def test_at_full_size(generation, shape):
    assert_runs_kernels(compiled_text(generation, *shape))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [TOWER, TEXT_7B])
def test_in_float32(shape):
    assert_runs_kernels(compiled_text("v5e", *shape, dtype=jnp.float32))


@pytest.mark.slow
def test_the_longest_schedule_fits_scalar_memory():
    """Five rows of the tower in one call have 128,000 pairs of blocks."""
    assert_runs_kernels(compiled_text("v5e", *TOWER, rows=5))


@pytest.mark.slow
def test_ring_attention():
    """The kernels occur in the loop over slices and after it, with float32 results of bfloat16 operands."""
    assert_runs_kernels(compiled_text("v5e", *TEXT_7B, context=2), times=2)


@pytest.mark.parametrize(
    "generation", [name if name == "v5e" else pytest.param(name, marks=pytest.mark.slow) for name in SLICES]
)
def test_kernels_of_tracking(generation):
    """Heads of a memory and depthwise convolutions, of four objects on four chips."""
    mesh = make_mesh({"fsdp": 4}, compiler.topology_devices(parse_topology(SLICES[generation])))
    rows = ("batch", None, None)

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def run(x, kernel, bias, rotary, in_maps, elsewhere, maps, taps):
        arrays, axes = (x, kernel, bias, rotary, in_maps, elsewhere), (rows, *[(None,) * n for n in (3, 2, 2, 2)], rows)
        heads = on_each_device(tpu_projection, arrays, axes, (*rows, None))
        convolved = on_each_device(tpu_depthwise, (maps, taps), ((*rows, None), (None,) * 4), (*rows, None))
        return heads, convolved

    memory = shape(4, 7 * 4096 + 512, 64), shape(64, 1, 256), shape(1, 256), shape(4096, 256, dtype=jnp.float32)
    positions = shape(7 * 4096, 64), shape(4, 512, 64)
    with jax.set_mesh(mesh), compiler.quiet():
        lowered = jax.jit(run).lower(*memory, *positions, shape(4, 64, 64, 256), shape(7, 7, 1, 256))
        text = lowered.compile().as_text()
    assert sum('custom_call_target="tpu_custom_call"' in line for line in text.splitlines()) == 2
    assert "bf16[1,64,64,256]" in text  # an object on each chip
