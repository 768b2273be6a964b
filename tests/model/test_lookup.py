"""Tests the lookup of embeddings block by block against that in the whole table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from support.tolerances import REORDERED
from vl3_jax.model.lookup import TABLE_AXES, lookup
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.rules import partition_spec

MESHES = [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 4}, {"fsdp": 2, "tensor": 2, "context": 2}]


def value_and_gradient(table, tokens, weights, **sizes):
    def total(table):
        found = lookup(table, tokens, jnp.float32, **sizes)
        return jnp.sum(found * weights), found

    (_, found), gradient = jax.value_and_grad(total, has_aux=True)(table)
    return found, gradient


def assert_equal_to_whole_table(sizes, vocabulary, block, tile, seed):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(vocabulary, 8)).astype(np.float32)
    tokens = rng.integers(-1, vocabulary, (8, 12)).astype(np.int32)
    tokens[:2] = tokens[0, 0]  # rows of one token
    weights = rng.normal(size=(*tokens.shape, 8)).astype(np.float32)
    expected, expected_gradient = value_and_gradient(table, tokens, weights)
    mesh = make_mesh(sizes, jax.devices()[:8])
    with jax.set_mesh(mesh):
        on_mesh = jax.device_put(table, NamedSharding(mesh, partition_spec(TABLE_AXES, table.shape, mesh)))
        tokens, weights = jax.device_put((tokens, weights), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
        run = jax.jit(value_and_gradient, static_argnames=("block", "tile"))
        found, gradient = run(on_mesh, tokens, weights, block=block, tile=tile)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(gradient, expected_gradient, atol=REORDERED, rtol=REORDERED)
    assert not np.any(np.asarray(found)[np.asarray(tokens) < 0])


@pytest.mark.parametrize("sizes", MESHES)
def test_equal_to_the_whole_table(sizes):
    """Blocks that do not divide a shard: the last one repeats rows of the one before."""
    assert_equal_to_whole_table(sizes, 40, 24, 5, 0)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 12), st.integers(1, 120), st.integers(1, 20), st.integers(0, 99))
def test_any_sizes_of_blocks_and_tiles(eighths, block, tile, seed):
    assert_equal_to_whole_table({"fsdp": 8}, 8 * eighths, block, tile, seed)


def test_a_frozen_table_has_no_gradient_in_the_trace():
    mesh, table = make_mesh({"fsdp": 8}, jax.devices()[:8]), jnp.ones((16, 8))
    with jax.set_mesh(mesh):
        trace = jax.make_jaxpr(
            jax.grad(lambda scale: lookup(table, jnp.zeros((8, 4), jnp.int32), jnp.float32).sum() * scale)
        )(1.0)
    assert "scatter-add" not in str(trace)


def test_a_few_tokens_do_not_gather_the_table():
    mesh, table = make_mesh({"fsdp": 8}, jax.devices()[:8]), jnp.arange(1024.0 * 8).reshape(1024, 8)
    tokens = jnp.arange(16, dtype=jnp.int32).reshape(8, 2)
    with jax.set_mesh(mesh):
        table = jax.device_put(table, NamedSharding(mesh, partition_spec(TABLE_AXES, table.shape, mesh)))
        run = jax.jit(lambda table, tokens: lookup(table, tokens, jnp.float32)).lower(table, tokens).compile()
    assert "all-gather" not in run.as_text()
    np.testing.assert_array_equal(run(table, tokens), np.asarray(table)[tokens])
