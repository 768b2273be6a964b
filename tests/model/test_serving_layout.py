"""Tests that the layout for serving gives what the layout of training gives, with a cache and without, in float32."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from support.forward import forward
from support.samples import random_sample, random_visual, shape_for
from support.tolerances import END_TO_END, INT8_CACHE_LOGITS, REORDERED, relative_error, relative_norm
from support.weights import random_params
from vl3_jax.model import KVCache, VideoLLaMA3, abstract_params, decode, preset, unembed
from vl3_jax.model.quantize import TIED_HEAD, QuantizedKernel, contracted_dimensions, outputs_first
from vl3_jax.model.serving_layout import abstract_serving_params, serving_axes, serving_leaves, to_serving
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.rules import shardings
from vl3_jax.processing.packed_batch import pack

MODEL = VideoLLaMA3(preset("tiny"))
PARAMS = random_params(MODEL.config)
SERVING_MODEL = VideoLLaMA3(MODEL.config, serving=True)
pytestmark = pytest.mark.usefixtures("fast_compile")


@functools.cache
def serving_params(quantize=None):
    return to_serving(PARAMS, MODEL.config, quantize)


def dequantized(path, leaf):
    """Returns the float32 values of a quantised kernel, in the order of the kernel."""
    if not isinstance(leaf, QuantizedKernel) or path == TIED_HEAD:
        return leaf
    order = outputs_first(leaf.values.ndim, contracted_dimensions(path, leaf.values.ndim))
    return (leaf.values * leaf.scale).transpose(np.argsort(order))


def packed_batch():
    rng = np.random.default_rng(2)
    rows = [
        [random_sample(rng, [random_visual(rng, (1, 4, 6), 1)], text=9), random_sample(rng, [], text=12)],
        [random_sample(rng, [random_visual(rng, (2, 4, 4), 2)], text=5)],
    ]
    return pack(rows, shape_for(rows))


def test_logits_equal_those_of_training():
    batch = packed_batch()
    expected = forward(MODEL, PARAMS, batch)
    assert relative_error(forward(SERVING_MODEL, serving_params(), batch), expected) <= REORDERED


def test_logits_of_int8_weights_equal_those_of_the_same_values():
    batch, leaves = packed_batch(), flatten_dict(serving_params("int8"), sep="/")
    values = unflatten_dict({path: dequantized(path, leaf) for path, leaf in leaves.items()}, sep="/")
    expected = forward(SERVING_MODEL, values, batch)  # on a CPU activations have 16 bits in products with int8
    assert relative_error(forward(SERVING_MODEL, serving_params("int8"), batch), expected) <= END_TO_END


def cached_logits(model, params, rows=None, dtype=jnp.float32):
    """Returns the logits of chunks of tokens, many and few, written to a cache of three rows."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 400, (2, 24)).astype(np.int32)
    segments, positions = np.ones_like(tokens), np.broadcast_to(np.arange(24, dtype=np.int32), (2, 24))
    cache = KVCache.empty(model.config.text, 2 if rows is None else 3, 32, dtype, model.serving)
    rows = rows if rows is None else jnp.array(rows, jnp.int32)
    step, parts = jax.jit(functools.partial(decode, model)), []
    for part in (slice(0, 20), slice(20, 21), slice(21, 24)):
        chunk = (tokens[:, part], None, -segments[:, part], segments[:, part], positions[:, part])
        hidden, cache = step(params, *chunk, cache, rows)
        parts.append(hidden)
    return unembed(model, params, jnp.concatenate(parts, axis=1)), cache


@pytest.mark.parametrize(("serving", "rows"), [(False, (2, 0)), (True, None), (True, (2, 0))])
def test_a_cache_of_any_layout_and_rows(serving, rows):
    expected, _ = cached_logits(MODEL, PARAMS)
    logits, cache = cached_logits(*((SERVING_MODEL, serving_params()) if serving else (MODEL, PARAMS)), rows)
    assert relative_error(logits, expected) <= REORDERED
    assert cache.length.tolist() == ([24, 24] if rows is None else [24, 0, 24])


def test_sharded_equals_unsharded():
    model, params, rows = SERVING_MODEL, serving_params(), (2, 0)
    expected, _ = cached_logits(model, params)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    sharded = jax.device_put(params, shardings(params, serving_axes(model.config), mesh))
    with jax.set_mesh(mesh):
        for cache_rows in (None, rows):
            assert relative_error(cached_logits(model, sharded, cache_rows)[0], expected) <= REORDERED


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_shapes_and_axes_are_those_of_the_parameters(quantize):
    found = serving_params(quantize)
    abstract = abstract_serving_params(MODEL.config, quantize=quantize)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), found) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract
    )
    shardings(abstract, serving_axes(MODEL.config, quantize), make_mesh({"fsdp": 8}))


@pytest.mark.parametrize("name", ["tiny", "7b"])
def test_pieces_fill_every_leaf_once_from_every_parameter(name):
    config, used = preset(name), set()
    for path, leaf in serving_leaves(config).items():
        size = 0
        for piece in leaf.pieces:
            part = np.broadcast_to(np.int8(0), leaf.split_shape)[piece.index]
            size += part.size
            used.add((piece.path, piece.layer))
        assert size == np.prod(leaf.shape), path
        assert sorted(map(math.prod, leaf.splits)) == sorted(leaf.shape)
        assert len(leaf.axes) == len(leaf.shape)
    stored = flatten_dict(abstract_params(config), sep="/")
    assert len(used) == sum(leaf.shape[0] if "/layers/" in path else 1 for path, leaf in stored.items())


def test_an_int8_cache_agrees():
    expected, _ = cached_logits(MODEL, PARAMS)
    logits, cache = cached_logits(MODEL, PARAMS, dtype=jnp.int8)
    agreement = np.mean(np.argmax(logits, -1) == np.argmax(expected, -1))
    error = relative_norm(logits, expected)
    print(f"int8 cache: top-1 agreement {agreement:.3f}, relative error {error:.4f}")
    assert 0 < error <= INT8_CACHE_LOGITS
    assert agreement >= 0.9
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache.keys_values)) < 0.4 * 2 * cache.keys_values.keys.size * 4


def test_a_truncated_row_keeps_its_first_slots():
    _, cache = cached_logits(MODEL, PARAMS)
    cut = cache.truncate(jnp.int32(1), jnp.int32(7))
    assert cut.length.tolist() == [24, 7]
    assert (np.asarray(cut.segment_ids) > 0).sum(1).tolist() == [24, 7]
