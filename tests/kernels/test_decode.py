"""Tests attention of a few queries to a cache: equal to dense attention to one layer, reading only slots in use."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.compiler import needs_compiler
from support.tolerances import ATTENTION, ATTENTION_BFLOAT16, REORDERED, relative_error
from vl3_jax.kernels import blockwise_decode, tpu_decode
from vl3_jax.kernels.backend import AttentionInputs
from vl3_jax.kernels.blockwise_decode import blockwise_decode_attention, used_blocks
from vl3_jax.kernels.dense import dense_attention
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.kernels.tpu_decode import tpu_decode_attention, tpu_decode_unsupported_reason
from vl3_jax.model.attention import attention
from vl3_jax.parallel.mesh import make_mesh

LAYER = 1
FUNCTIONS = {
    "blockwise": blockwise_decode_attention,
    "tpu": functools.partial(tpu_decode_attention, interpret=True),
}


def random_inputs(
    infos, heads, kv_heads, width, causal=True, q_dtype=jnp.float32, dtype=jnp.float32
) -> AttentionInputs:
    """Returns random queries and caches of three layers for the info of queries and slots."""
    rows, length = infos[0].segment_ids.shape
    slots = infos[1].segment_ids.shape[1]
    q = jax.random.normal(jax.random.key(1), (rows, length, heads, width)).astype(q_dtype)
    keys = jax.random.split(jax.random.key(0))
    cache = [jax.random.normal(key, (3, rows, slots, kv_heads, width)).astype(dtype) for key in keys]
    return AttentionInputs(q, *cache, *infos, causal=causal, scale=width**-0.5)


def ragged_info(used: list[int], slots: int, length: int) -> tuple[SegmentInfo, SegmentInfo]:
    """Returns the info of queries and slots for rows of which the first `used` slots are written.

    The queries are the newest `length` tokens of each row; those before its first token are padding.
    """
    used = np.array(used, np.int32)[:, None]
    slot = np.arange(slots, dtype=np.int32)[None]
    q_position = used - length + np.arange(length, dtype=np.int32)
    q_info = SegmentInfo((q_position >= 0).astype(np.int32), q_position)
    return q_info, SegmentInfo((slot < used).astype(np.int32), slot + 0 * used)


def dense(inputs):
    return dense_attention(inputs.replace(q=inputs.q.astype(jnp.float32)).select_layer(LAYER))


def run(name, inputs):
    return jax.jit(FUNCTIONS[name])(inputs, jnp.int32(LAYER))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "width", "slots"), [(1, 12, 2, 128, 1024), (3, 7, 1, 16, 768), (16, 4, 4, 128, 96)]
)
def test_equal_to_dense(name, length, heads, kv_heads, width, slots):
    inputs = random_inputs(ragged_info([slots, 0, slots // 3, 1], slots, length), heads, kv_heads, width)
    out = run(name, inputs)
    np.testing.assert_allclose(out, dense(inputs), atol=ATTENTION)
    assert not np.any(out[1])


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_equal_to_dense_with_freed_slots_in_any_order(name, causal):
    rng = np.random.default_rng(0)
    positions = rng.permuted(np.tile(np.arange(512, dtype=np.int32), (2, 1)), axis=1)
    kv_info = SegmentInfo(rng.integers(0, 4, (2, 512), np.int32), positions)
    q_info = SegmentInfo(np.array([[1, 3, 0], [2, 2, 9]], np.int32), np.array([[100, 400, 5], [0, 511, 7]], np.int32))
    inputs = random_inputs((q_info, kv_info), 4, 2, 16, causal)
    np.testing.assert_allclose(run(name, inputs), dense(inputs), atol=ATTENTION)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("q_dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_bfloat16_cache(name, q_dtype):
    inputs = random_inputs(ragged_info([300, 512], 512, 1), 4, 2, 128, q_dtype=q_dtype, dtype=jnp.bfloat16)
    out = run(name, inputs)
    assert out.dtype == q_dtype
    tolerance = ATTENTION if q_dtype == jnp.float32 else ATTENTION_BFLOAT16
    np.testing.assert_allclose(out.astype(jnp.float32), dense(inputs), atol=tolerance)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_unused_blocks_are_not_read(name):
    """Unused blocks and all other layers are NaN, which would spread to the output."""
    module = {"blockwise": blockwise_decode, "tpu": tpu_decode}[name]
    used = [1, 700, module.BLOCK, 0]
    inputs = random_inputs(ragged_info(used, 2048, 1), 4, 2, 16)
    cache, expected = (inputs.k, inputs.v), dense(inputs)
    for row, slots in enumerate(used):
        first_unused = -(-slots // module.BLOCK) * module.BLOCK
        cache = [x.at[:, row, first_unused:].set(np.nan) for x in cache]
    k, v = (jnp.where(jnp.arange(3)[:, None, None, None, None] == LAYER, x, np.nan) for x in cache)
    np.testing.assert_allclose(run(name, inputs.replace(k=k, v=v)), expected, atol=ATTENTION)


def test_used_blocks_follow_the_slots_in_use():
    inputs = random_inputs(ragged_info([1, 256, 257, 1500, 0, 4096], 4096, 1), 1, 1, 1)
    order, count = used_blocks(inputs, 256)
    np.testing.assert_array_equal(count, [1, 1, 2, 6, 0, 16])
    np.testing.assert_array_equal(order[3, :6], np.arange(6))
    inputs.kv_info.segment_ids[5, :1024] = 0  # freed
    order, count = used_blocks(inputs, 256)
    np.testing.assert_array_equal(count, [1, 1, 2, 6, 0, 12])
    np.testing.assert_array_equal(order[5, :12], np.arange(4, 16))


def cache_attention(inputs, layer):
    return attention(inputs, layer=layer)


@pytest.mark.parametrize("length", [1, 24])
def test_attention_to_a_layer_of_a_cache(length):
    """Runs few and many queries on one device and on a mesh."""
    inputs = random_inputs(ragged_info([512, 300, 30, 100], 512, length), 4, 2, 16)
    expected = dense(inputs)
    assert relative_error(jax.jit(cache_attention)(inputs, jnp.int32(LAYER)), expected) <= REORDERED
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        assert relative_error(jax.jit(cache_attention)(inputs, jnp.int32(LAYER)), expected) <= REORDERED


def test_a_few_queries_do_not_copy_the_layer():
    inputs = random_inputs(ragged_info([500], 8192, 1), 4, 2, 64)
    compiled = jax.jit(cache_attention).lower(inputs, jnp.int32(LAYER)).compile()
    layer_bytes = inputs.k[0].nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < layer_bytes / 4


@pytest.mark.parametrize(
    ("slots", "kv_heads", "width", "reason"),
    [(512, 2, 72, "72 channels"), (96, 1, 128, "96 slots"), (96, 4, 128, None)],
)
def test_operands_that_the_tpu_kernel_does_not_support(slots, kv_heads, width, reason):
    inputs = random_inputs(ragged_info([slots], slots, 1), 4, kv_heads, width)
    unsupported_reason = tpu_decode_unsupported_reason(inputs)
    assert unsupported_reason is None if reason is None else reason in unsupported_reason


COMPILE_FOR_TPU = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from vl3_jax.kernels.backend import AttentionInputs
from vl3_jax.kernels.dispatch import decode_attention
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.model.cache import write_layer

mesh = Mesh(np.array(topologies.get_topology_desc(sys.argv[1], platform="tpu").devices[:1]), "x")
replicated = NamedSharding(mesh, PartitionSpec())


def shape(size, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(size, dtype, sharding=replicated)


def step(q, keys, values, q_info, kv_info, slots, new):
    def layer(index, carry):
        q, *caches = carry
        caches = [write_layer(cache, index, slots, new) for cache in caches]
        inputs = AttentionInputs(q, *caches, q_info, kv_info, causal=True, scale=0.1)
        return decode_attention(inputs, index), *caches

    return jax.lax.fori_loop(0, keys.shape[0], layer, (q, keys, values))


for rows, length, heads, kv_heads, slots, dtype in [
    (1, 1, 12, 2, 16_384, jnp.bfloat16),
    (2, 16, 28, 4, 3072, jnp.float32),
]:
    info = [SegmentInfo(*[shape((rows, size))] * 2) for size in (length, slots)]
    cache = shape((8, rows, slots, kv_heads, 128), dtype)
    operands = shape((rows, length, heads, 128), dtype), cache, cache, *info, shape((rows, length))
    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=(1, 2)).lower(*operands, shape((rows, length, kv_heads, 128), dtype))
        compiled = lowered.compile()
    assert "decode_kernel" in lowered.as_text()
    layer_bytes = rows * slots * kv_heads * 128 * jnp.dtype(dtype).itemsize
    print("bytes", layer_bytes, compiled.memory_analysis().temp_size_in_bytes)
"""


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_compiles_for_tpus_without_a_copy_of_a_layer(topology):
    """Writes and reads the cache in a loop over layers, as the decoder does."""
    environment = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, "-c", COMPILE_FOR_TPU, topology]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    sizes = [line.split()[1:] for line in result.stdout.splitlines() if line.startswith("bytes")]
    assert len(sizes) == 2
    for layer_bytes, temporaries in sizes:
        assert int(temporaries) < int(layer_bytes) / 4
