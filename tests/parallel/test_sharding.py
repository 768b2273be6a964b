"""Tests the sharding rules, and the sharded model against the unsharded one on eight host devices."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from support.forward import TEXT_KEYS, VISION_KEYS
from support.samples import random_sample, random_visual, shape_for
from support.tolerances import GRADIENT, REORDERED, relative_error
from support.weights import random_params
from vl3_jax.errors import InputError
from vl3_jax.model import KVCache, VideoLLaMA3, abstract_params, decode, encode, param_axes, preset, unembed
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.rules import batch_shardings, partition_spec, shardings
from vl3_jax.processing.packed_batch import pack

MODEL = VideoLLaMA3(preset("tiny"))
PARAMS = random_params(MODEL.config)
pytestmark = pytest.mark.usefixtures("fast_compile")
MESHES = [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2, "context": 2}]


def packed_rows(rows: int = 8) -> dict:
    rng = np.random.default_rng(0)
    samples = [
        [
            random_sample(rng, [random_visual(rng, (2, 4, 4), 2, still=0.4)], text=5),
            random_sample(rng, [random_visual(rng, (1, 4, 6), 1)], text=3),
        ]
        for _ in range(rows)
    ]
    return pack(samples, shape_for(samples, vision_rows=2))


def loss(params, batch):
    features = encode(MODEL, params, *(batch[key] for key in VISION_KEYS))
    hidden, _ = decode(MODEL, params, batch["tokens"], features, *(batch[key] for key in TEXT_KEYS))
    logits = jax.nn.log_softmax(unembed(MODEL, params, hidden))
    target_logits = jax.numpy.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    return -(target_logits * batch["loss_weight"]).sum() / batch["loss_weight"].sum(), logits


@functools.cache
def unsharded():
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS, packed_rows())


@pytest.mark.parametrize(
    "sizes", [pytest.param(sizes, marks=[pytest.mark.slow] * ("tensor" not in sizes)) for sizes in MESHES], ids=str
)
def test_sharded_equals_unsharded(sizes):
    (expected_loss, expected_logits), expected_gradients = unsharded()
    mesh = make_mesh(sizes)
    param_shardings = shardings(abstract_params(MODEL.config), param_axes(MODEL.config), mesh)
    batch = packed_rows()
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, param_shardings)
        batch = jax.device_put(batch, batch_shardings(batch, mesh))
        step = jax.jit(jax.value_and_grad(loss, has_aux=True), in_shardings=(param_shardings, None))
        (value, logits), gradients = step(params, batch)
    assert abs(value - expected_loss) <= REORDERED * expected_loss
    assert relative_error(logits, expected_logits) <= REORDERED
    errors = jax.tree.map(relative_error, gradients, expected_gradients)
    print(f"{sizes}: largest relative difference of a gradient {max(jax.tree.leaves(errors)):.1e}")
    assert max(jax.tree.leaves(errors)) <= GRADIENT, errors


def test_sharded_decoding_equals_unsharded():
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 400, (4, 24)).astype(np.int32)
    segments, positions = np.ones_like(tokens), np.broadcast_to(np.arange(24, dtype=np.int32), (4, 24))

    @jax.jit
    def run(params):
        cache = KVCache.empty(MODEL.config.text, 4, 32)
        parts = []
        for part in (slice(0, 20), slice(20, 21), slice(21, 24)):
            arguments = (tokens[:, part], None, -segments[:, part], segments[:, part], positions[:, part])
            hidden, cache = decode(MODEL, params, *arguments, cache)
            parts.append(hidden)
        return unembed(MODEL, params, jax.numpy.concatenate(parts, axis=1))

    expected = run(PARAMS)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    param_shardings = shardings(abstract_params(MODEL.config), param_axes(MODEL.config), mesh)
    with jax.set_mesh(mesh):
        assert relative_error(run(jax.device_put(PARAMS, param_shardings)), expected) <= REORDERED


@pytest.mark.parametrize("name", ["tiny", "2b", "7b"])
def test_no_parameter_is_fully_replicated(name):
    config = preset(name)
    tree, axes, mesh = abstract_params(config), param_axes(config), make_mesh({"fsdp": 8})
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings(tree, axes, mesh)):
        assert not sharding.is_fully_replicated, jax.tree_util.keystr(path)


def test_partition_specs():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert partition_spec(("embed", "mlp"), (64, 128), mesh) == P("fsdp", "tensor")
    assert partition_spec(("mlp",), (128,), mesh) == P(("tensor", "fsdp"))
    assert partition_spec(("batch", None), (8, 3), mesh) == P(("data", "fsdp"), None)
    assert partition_spec(("batch",), (2,), mesh) == P("data")  # two rows do not divide over four devices
    assert partition_spec(("kv_heads",), (3,), mesh) == P(None)  # three heads do not split in two


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"fdsp": 8}, "unknown mesh axis 'fdsp'"), ({"fsdp": 3}, "8 devices"), ({"fsdp": -1, "data": 16}, "8 devices")],
)
def test_invalid_mesh_sizes_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        make_mesh(sizes)
    assert make_mesh({"fsdp": -1, "tensor": 2}).shape["fsdp"] == 4
