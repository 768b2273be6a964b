"""The tiled loss against the plain loss, value and gradients, on one device and on meshes."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from tiny import FAST_COMPILE

from support.compiler import needs_compiler
from support.tolerances import REORDERED, relative_norm
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.rules import partition_spec
from vl3_jax.training.cross_entropy import token_losses
from vl3_jax.training.loss import loss_sums, token_tasks


def inputs(rows, length, width, vocab, vocab_axis, share, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((rows, length, width)).astype(np.float32)
    matrix = rng.standard_normal((vocab, width) if vocab_axis == 0 else (width, vocab)).astype(np.float32)
    targets = rng.integers(0, vocab, (rows, length)).astype(np.int32)
    weight = (rng.normal(1, 1, (rows, length)) * (rng.random((rows, length)) < share)).astype(np.float32)
    return hidden, matrix, targets, weight


@functools.partial(jax.jit, static_argnums=4, compiler_options=FAST_COMPILE)
@functools.partial(jax.value_and_grad, argnums=(0, 1))
def plain(hidden, matrix, targets, weight, vocab_axis):
    equation = "bld,vd->blv" if vocab_axis == 0 else "bld,dv->blv"
    logits = jnp.einsum(equation, hidden, matrix, precision="highest")
    target_scores = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(target_scores * weight)


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7), compiler_options=FAST_COMPILE)
@functools.partial(jax.value_and_grad, argnums=(0, 1))
def tiled(hidden, matrix, targets, weight, vocab_axis, token_block, vocab_block, kept_bytes=0):
    sizes = {"token_block": token_block, "vocab_block": vocab_block, "kept_bytes": kept_bytes}
    return jnp.sum(token_losses(hidden, matrix, targets, weight != 0, vocab_axis=vocab_axis, **sizes) * weight)


def assert_same(ours, reference):
    """Compares values and both gradients; the value may be a small sum of large losses, hence `atol`."""
    np.testing.assert_allclose(ours[0], reference[0], rtol=REORDERED, atol=1e-4)
    for gradient, expected in zip(ours[1], reference[1], strict=True):
        if not np.any(expected):
            assert not np.any(gradient)
        else:
            assert relative_norm(gradient, expected) <= REORDERED


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 20),
    width=st.integers(1, 12),
    vocab=st.integers(2, 50),
    vocab_axis=st.integers(0, 1),
    share=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    token_block=st.sampled_from([1, 4, 7, 1024]),
    vocab_block=st.sampled_from([1, 8, 13, 8192]),
    kept_bytes=st.sampled_from([0, 2**20]),
)
def test_the_tiled_loss_equals_the_plain_loss(rows, length, width, vocab, vocab_axis, share, **sizes):
    arrays = inputs(rows, length, width, vocab, vocab_axis, share)
    assert_same(tiled(*arrays, vocab_axis, *sizes.values()), plain(*arrays, vocab_axis))


MESHES = [
    ({"fsdp": 8}, (8, 6, 16, 64)),  # rows and vocabulary split over the same axis
    ({"fsdp": 8}, (2, 6, 16, 64)),  # too few rows: only the vocabulary is split
    ({"fsdp": 8}, (3, 6, 16, 37)),  # the vocabulary does not divide: the width is split instead
    ({"data": 2, "fsdp": 2, "tensor": 2}, (8, 6, 16, 64)),
    ({"fsdp": 2, "tensor": 2, "context": 2}, (4, 6, 16, 64)),
]


@pytest.mark.parametrize(("sizes", "shape"), MESHES, ids=str)
@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_the_sharded_loss_equals_the_plain_loss(sizes, shape, vocab_axis):
    hidden, matrix, targets, weight = inputs(*shape, vocab_axis, 0.4)
    mesh = make_mesh(sizes)
    axes = ("vocab", "embed") if vocab_axis == 0 else ("embed", "vocab")
    sharding = NamedSharding(mesh, partition_spec(axes, matrix.shape, mesh))
    with jax.set_mesh(mesh):
        ours = tiled(hidden, jax.device_put(matrix, sharding), targets, weight, vocab_axis, 4, 24)
    assert ours[1][1].sharding.is_equivalent_to(sharding, 2)
    assert_same(ours, plain(hidden, matrix, targets, weight, vocab_axis))


@pytest.mark.parametrize(("kept_bytes", "expected"), [(0, [3, 4]), (2**20, [2, 3])], ids=["recomputed", "kept"])
def test_a_frozen_unembedding_is_not_differentiated(kept_bytes, expected):
    """Logits are computed once if they are kept, and twice otherwise."""
    arrays = inputs(2, 8, 16, 32, 0, 0.5)

    def loss(hidden, matrix, targets, weight):
        return jnp.sum(token_losses(hidden, matrix, targets, weight != 0, kept_bytes=kept_bytes) * weight)

    products = [str(jax.make_jaxpr(jax.grad(loss, argnums))(*arrays)).count("dot_general") for argnums in (0, (0, 1))]
    assert products == expected
    np.testing.assert_array_equal(jax.grad(loss, 0)(*arrays), jax.grad(loss, (0, 1))(*arrays)[0])


def test_unsupervised_positions_have_no_effect():
    hidden, matrix, targets, weight = inputs(2, 8, 16, 32, 0, 0.5)
    hidden_2 = np.where((weight == 0)[..., None], 1e6, hidden).astype(np.float32)
    targets_2 = np.where(weight == 0, -7, targets)
    first, second = (tiled(h, matrix, t, weight, 0, 4, 8) for h, t in ((hidden, targets), (hidden_2, targets_2)))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, second))
    assert not np.any(np.asarray(first[1][0])[weight == 0])


def test_gradients_have_the_types_of_their_arrays():
    hidden, matrix, targets, weight = inputs(2, 8, 16, 64, 0, 1.0)
    low = jnp.asarray(hidden, jnp.bfloat16)
    for dtype in (jnp.bfloat16, jnp.float32):
        value, (d_hidden, d_matrix) = tiled(low, jnp.asarray(matrix, dtype), targets, weight, 0, 4, 8)
        assert (value.dtype, d_hidden.dtype, d_matrix.dtype) == (jnp.float32, jnp.bfloat16, dtype)
        rounded = (low.astype(jnp.float32), matrix.astype(jnp.bfloat16).astype(np.float32))
        expected, (e_hidden, e_matrix) = plain(*rounded, targets, weight, 0)
        assert abs(value - expected) <= 1e-5 * abs(expected)  # logits and softmax are float32
        half_ulp = 2.0**-8  # relative error of rounding the probabilities to bfloat16
        assert max(relative_norm(d_hidden, e_hidden), relative_norm(d_matrix, e_matrix)) <= half_ulp


def test_losses_are_summed_by_task():
    hidden, matrix, targets, weight = inputs(2, 8, 16, 32, 0, 0.7)
    segments = np.array([[1, 1, 1, 2, 2, 3, 3, 0], [1, 1, 1, 1, 2, 2, 0, 0]], np.int32)
    tasks = np.array([[2, 0, 1], [1, 1, 0]], np.int32)
    weight = np.where(segments > 0, weight, 0)
    expected = np.array([[2, 2, 2, 0, 0, 1, 1, -1], [1, 1, 1, 1, 1, 1, -1, -1]])
    np.testing.assert_array_equal(token_tasks(tasks, segments), expected)
    batch = {"targets": targets, "loss_weight": weight, "segment_ids": segments, "sample_task": tasks}
    sums = loss_sums(hidden, matrix, batch, vocab_axis=0, tasks=3)
    losses = np.asarray(token_losses(hidden, matrix, targets, weight != 0))
    for task in range(3):
        in_task = expected == task
        np.testing.assert_allclose(sums.task_loss[task], (losses * weight)[in_task].sum(), rtol=1e-5)
        np.testing.assert_allclose(sums.task_weight[task], weight[in_task].sum(), rtol=1e-6)
    np.testing.assert_allclose(sums.loss, (losses * weight).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.weight, weight.sum(), rtol=1e-6)


AHEAD_OF_TIME = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from vl3_jax.training.cross_entropy import token_losses

LENGTH, VOCAB, WIDTH = 16_384, 151_936, 1536
sharding = SingleDeviceSharding(topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0])

def shape(*size, dtype):
    return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

def loss(hidden, matrix, targets, weight):
    return jnp.sum(token_losses(hidden, matrix, targets, weight != 0) * weight)

step = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(
    shape(1, LENGTH, WIDTH, dtype=jnp.bfloat16),
    shape(VOCAB, WIDTH, dtype=sys.argv[1]),
    shape(1, LENGTH, dtype=jnp.int32),
    shape(1, LENGTH, dtype=jnp.float32),
)
print("temporaries", step.compile().memory_analysis().temp_size_in_bytes)
"""


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory_on_a_tpu(dtype):
    """On a v5e chip, logits would take 10 GB; the temporaries of loss and gradients take at most 0.7 GB."""
    environment = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, "-c", AHEAD_OF_TIME, dtype]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    (size,) = [int(line.split()[1]) for line in process.stdout.splitlines() if line.startswith("temporaries")]
    print(f"{dtype} unembedding: {size / 1e9:.2f} GB")
    assert size <= 0.7e9
