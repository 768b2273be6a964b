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
from support.tolerances import ATTENTION, ATTENTION_BFLOAT16, INT8_CACHE
from vl3_jax.kernels.blockwise_decode import blockwise_decode_attention, dense_decode_attention
from vl3_jax.kernels.decode_inputs import DecodeInputs, decode_schedule
from vl3_jax.kernels.keys_values import KeysValues
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.kernels.tpu_decode import tpu_decode_attention, tpu_decode_unsupported_reason
from vl3_jax.model.attention import cache_schedule, cached_attention
from vl3_jax.parallel.mesh import make_mesh

LAYER = 1
FUNCTIONS = {
    "blockwise": blockwise_decode_attention,
    "tpu": functools.partial(tpu_decode_attention, interpret=True),
}


def random_inputs(
    infos, heads, kv_heads, width, q_dtype=jnp.float32, dtype=jnp.float32, rows=None, max_block=256
) -> DecodeInputs:
    """Returns random queries and caches of three layers for the info of queries and slots."""
    batch, length = infos[0].segment_ids.shape
    slots = infos[1].segment_ids.shape[1]
    rng = np.random.default_rng(0)  # of NumPy, because XLA compiles its own anew for each shape
    qkv = jnp.asarray(rng.standard_normal((batch, length, (heads + 2 * kv_heads) * width), np.float32), q_dtype)
    angles = rng.uniform(0, 100, (batch, length, width // 2)).astype(np.float32)
    rotary = jnp.asarray(np.concatenate([np.cos(angles), np.sin(angles)], -1))
    shape = (3, batch, kv_heads, slots, width)
    if dtype == jnp.int8:
        values = [rng.integers(-127, 128, shape, np.int8) for _ in range(2)]
        scales = [rng.uniform(0, 1 / 64, shape[:-1]).astype(np.float32) for _ in range(2)]
        cache = jax.tree.map(jnp.asarray, KeysValues(*values, *scales))
    else:
        cache = KeysValues(*(jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for _ in range(2)))
    if rows is not None:
        rows = jnp.array(rows, jnp.int32)
    schedule = decode_schedule(*infos, max_block)
    return DecodeInputs(qkv, rotary, cache, jnp.int32(LAYER), rows, schedule, scale=width**-0.5)


def ragged_info(used: list[int], slots: int, length: int) -> tuple[SegmentInfo, SegmentInfo]:
    """Returns the info of new tokens and slots for rows of which the first `used` slots are written.

    The tokens follow them; those of a row without written slots are padding.
    """
    used = np.array(used, np.int32)[:, None]
    slot = np.arange(slots, dtype=np.int32)[None]
    q_position = used + np.arange(length, dtype=np.int32)
    q_info = SegmentInfo((used > 0) + 0 * q_position, q_position)
    return q_info, SegmentInfo((slot < used).astype(np.int32), slot + 0 * used)


@jax.jit
def dense(inputs):
    return dense_decode_attention(inputs.replace(qkv=inputs.qkv.astype(jnp.float32)))


def assert_close(found, expected, tolerance=ATTENTION):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=tolerance)


def run(name, inputs):
    return jax.jit(FUNCTIONS[name])(inputs)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "width", "slots"),
    [(1, 12, 2, 128, 1024), (3, 7, 1, 16, 768), pytest.param(16, 4, 4, 128, 96, marks=pytest.mark.slow)],
)
def test_equal_to_dense(name, length, heads, kv_heads, width, slots):
    inputs = random_inputs(ragged_info([slots, 0, slots // 3, 1], slots, length), heads, kv_heads, width)
    out = run(name, inputs)
    assert_close(out, dense(inputs))
    assert not np.any(out.out[1])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_equal_to_dense_with_freed_slots_in_any_order(name):
    rng = np.random.default_rng(0)
    positions = rng.permuted(np.tile(np.arange(512, dtype=np.int32), (2, 1)), axis=1)
    kv_info = SegmentInfo(rng.integers(0, 4, (2, 512), np.int32), positions)
    q_info = SegmentInfo(np.array([[1, 3, 0], [2, 2, 9]], np.int32), np.array([[100, 400, 5], [0, 511, 7]], np.int32))
    inputs = random_inputs((q_info, kv_info), 4, 2, 16)
    assert_close(run(name, inputs), dense(inputs))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("q_dtype", "dtype"),
    [(jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.bfloat16), (jnp.float32, jnp.int8), (jnp.bfloat16, jnp.int8)],
    ids=["bfloat16", "all in bfloat16", "int8", "int8 and bfloat16"],
)
def test_a_cache_of_another_type(name, q_dtype, dtype):
    inputs = random_inputs(ragged_info([300, 512], 512, 1), 4, 2, 128, q_dtype=q_dtype, dtype=dtype)
    out = run(name, inputs)
    assert out.out.dtype == q_dtype
    assert_close(out, dense(inputs), ATTENTION if q_dtype == jnp.float32 else ATTENTION_BFLOAT16)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8], ids=["float32", "int8"])
def test_rows_of_the_cache_by_index(name, dtype):
    rows = [2, 0, 1]
    infos = ragged_info([40, 256, 7], 256, 2)
    inputs = random_inputs(infos, 4, 2, 128, dtype=dtype, rows=rows)
    chosen = jax.tree.map(lambda x: x[:, jnp.array(rows)], inputs.keys_values)
    expected = dense(inputs.replace(keys_values=chosen, rows=None))
    assert_close(run(name, inputs), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_unused_blocks_are_not_read(name):
    """Unused blocks and all other layers are NaN, which would spread to the output."""
    used, block = [1, 700, 256, 0], 256
    inputs = random_inputs(ragged_info(used, 2048, 1), 4, 2, 16)
    expected = dense(inputs)

    def spoiled(x):
        for row, slots in enumerate(used):
            x = x.at[:, row, :, -(-slots // block) * block :].set(np.nan)
        return jnp.where(jnp.arange(3)[:, None, None, None, None] == LAYER, x, np.nan)

    keys_values = jax.tree.map(spoiled, inputs.keys_values)
    assert_close(run(name, inputs.replace(keys_values=keys_values)), expected)


def test_used_blocks_follow_the_slots_in_use():
    q_info, kv_info = ragged_info([1, 256, 257, 1500, 0, 4096], 4096, 1)
    *_, order, count = decode_schedule(q_info, kv_info, 256)
    np.testing.assert_array_equal(count, [1, 1, 2, 6, 0, 16])
    np.testing.assert_array_equal(order[3, :6], np.arange(6))
    kv_info.segment_ids[5, :1024] = 0  # freed
    *_, order, count = decode_schedule(q_info, kv_info, 256)
    np.testing.assert_array_equal(count, [1, 1, 2, 6, 0, 12])
    np.testing.assert_array_equal(order[5, :12], np.arange(4, 16))


@pytest.mark.parametrize(("slots", "max_block", "block"), [(96, 256, 96), (768, 512, 256), (17_408, 1024, 1024)])
def test_blocks_divide_the_slots(slots, max_block, block):
    assert decode_schedule(*ragged_info([1], slots, 1), max_block).block == block


def cache_attention(inputs, infos):
    schedule = cache_schedule(*infos, inputs.keys_values, None)
    arrays = inputs.qkv, inputs.rotary, infos, inputs.keys_values, inputs.layer
    return cached_attention(*arrays, None, schedule)


@pytest.mark.parametrize("length", [1, 24, 260])
def test_attention_to_a_layer_of_a_cache(length):
    """Runs few and many queries, and more than a layer is read in place for, on one device and on a mesh."""
    infos = ragged_info([512, 300, 30, 100], 512, length)
    inputs = random_inputs(infos, 4, 2, 16)
    expected = dense(inputs)
    assert_close(jax.jit(cache_attention)(inputs, infos), expected)
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        assert_close(jax.jit(cache_attention)(inputs, infos), expected)


def test_a_few_queries_do_not_copy_the_layer():
    infos = ragged_info([500], 8192, 1)
    inputs = random_inputs(infos, 4, 2, 64)
    compiled = jax.jit(cache_attention).lower(inputs, infos).compile()
    layer_bytes = inputs.keys_values.keys[0].nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < layer_bytes / 4


def random_cache(dtype) -> KeysValues:
    cache = random_inputs(ragged_info([5, 5], 8, 1), 2, 2, 16, dtype=dtype).keys_values
    return jax.tree.map(lambda x: x.at[:, 1].set(0), cache)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8], ids=["float32", "int8"])
@pytest.mark.parametrize(
    "slots", [[[2, 8, 3, 8, 8], [8, 8, 8, 5, 6]], [[4, 5, 6, 7, 8], [0, 1, 2, 3, 4]], [[7, 8, 8, 8, 8], [8] * 5]]
)
def test_new_tokens_are_written_to_their_slots_and_nothing_else_is(dtype, slots):
    """A token whose slot is 8 is dropped, in front of others, between and after them."""
    cache, slots, rows = random_cache(dtype), np.array(slots), np.array([1, 0])
    new = 3 * np.random.default_rng(0).standard_normal((2, 3, 2, 5, 2 * 16), np.float32)
    both = np.stack([x.reshape(3, 2, 5, 2, 16) for x in new], axis=-2).reshape(3, 2, 5, -1)
    written = jax.jit(KeysValues.write)(cache, rows, slots, both)
    for name, values in zip(("keys", "values"), new, strict=True):
        index = {"keys": 0, "values": 1}[name]
        for layer in range(3):
            before, after = (each.read(layer, None, jnp.float32)[index] for each in (cache, written))
            expected = np.array(before)
            for row, token in np.argwhere(slots < 8):
                expected[rows[row], :, slots[row, token]] = values[layer, row, token].reshape(2, 16)
            tolerance = 0 if dtype == jnp.float32 else INT8_CACHE
            np.testing.assert_allclose(after, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize(
    ("slots", "width", "reason"), [(512, 72, "72 channels"), (320, 128, "320 slots"), (96, 128, None)]
)
def test_operands_that_the_tpu_kernel_does_not_support(slots, width, reason):
    inputs = random_inputs(ragged_info([slots], slots, 1), 4, 2, width)
    unsupported_reason = tpu_decode_unsupported_reason(inputs)
    assert unsupported_reason is None if reason is None else reason in unsupported_reason


COMPILE_FOR_TPU = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from vl3_jax.kernels.decode_inputs import DecodeInputs
from vl3_jax.kernels.dispatch import decode_attention, decode_schedule_for
from vl3_jax.kernels.keys_values import KeysValues
from vl3_jax.kernels.segment_info import SegmentInfo

mesh = Mesh(np.array(topologies.get_topology_desc(sys.argv[1], platform="tpu").devices[:1]), "x")
replicated = NamedSharding(mesh, PartitionSpec())


def shape(size, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(size, dtype, sharding=replicated)


def step(qkv, rotary, keys_values, q_info, kv_info, slots):
    schedule = decode_schedule_for(q_info, kv_info, keys_values)

    def layer(index, qkv):
        inputs = DecodeInputs(qkv, rotary, keys_values, index, None, schedule, scale=0.1)
        out, new = decode_attention(inputs)
        return jnp.concatenate([out, new], axis=-1), new

    qkv, new = jax.lax.scan(lambda qkv, index: layer(index, qkv), qkv, jnp.arange(keys_values.keys.shape[0]))
    return qkv, keys_values.write(jnp.arange(len(qkv)), slots, new)


for rows, length, heads, kv_heads, slots, dtype, cache_dtype in [
    (1, 1, 12, 2, 16_384, jnp.bfloat16, jnp.bfloat16),
    (2, 16, 28, 4, 3072, jnp.float32, jnp.float32),
    (2, 1, 28, 4, 3072, jnp.bfloat16, jnp.int8),
]:
    info = [SegmentInfo(*[shape((rows, size))] * 2) for size in (length, slots)]
    cache = [shape((8, rows, kv_heads, slots, 128), cache_dtype)] * 2
    scales = [shape((8, rows, kv_heads, slots), jnp.float32)] * 2 if cache_dtype == jnp.int8 else []
    qkv = shape((rows, length, (heads + 2 * kv_heads) * 128), dtype)
    operands = qkv, shape((rows, length, 128), jnp.float32), KeysValues(*cache, *scales), *info
    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=2).lower(*operands, shape((rows, length)))
        compiled = lowered.compile()
    assert "decode_kernel" in lowered.as_text()
    layer_bytes = rows * slots * kv_heads * 128 * jnp.dtype(cache_dtype).itemsize
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
    assert len(sizes) == 3
    for layer_bytes, temporaries in sizes:
        assert int(temporaries) < int(layer_bytes) / 4
