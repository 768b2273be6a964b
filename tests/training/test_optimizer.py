"""The optimizer: its schedule, its groups, and its state and shardings."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny import LEARNING_RATES, MODEL, optimizer_for, run_jitted, start_params

from vl3_jax.errors import InputError
from vl3_jax.model import abstract_params, num_parameters, preset
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.training.groups import MODULES, WITH_LORA, flatten, split
from vl3_jax.training.lora import add_adapters
from vl3_jax.training.optimizer import OptimizerConfig, make_optimizer, matrix_dimensions, schedule
from vl3_jax.training.state import new_state, state_shardings

PARAMS = start_params()


def first_update(optimizer, gradients, trainable=PARAMS):
    return run_jitted(lambda g, p: optimizer.update(g, optimizer.init(PARAMS), p), gradients, trainable)


@pytest.mark.parametrize(("steps", "ratio"), [(10, 0.0), (10, 0.03), (100, 0.03), (121, 0.25), (1, 0.03), (7, 1.0)])
def test_the_schedule_is_that_of_transformers(steps, ratio):
    torch = pytest.importorskip("torch")
    pytest.importorskip("support.reference")  # which makes transformers importable beside any torchvision
    from transformers import get_cosine_schedule_with_warmup

    warmup = OptimizerConfig(LEARNING_RATES, warmup_ratio=ratio).warmup_steps(steps)
    assert warmup == min(math.ceil(ratio * steps), steps - 1)
    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_cosine_schedule_with_warmup(reference, warmup, steps)
    expected = []
    for _ in range(steps + 1):
        expected.append(scheduler.get_last_lr()[0])
        reference.step()
        scheduler.step()
    ours = schedule(steps, warmup)(np.arange(steps + 1))
    np.testing.assert_allclose(ours, expected, atol=2e-7)
    assert not warmup or ours[0] == 0


def test_each_group_has_its_learning_rate():
    """If all gradients are 1, the first update of AdamW is the learning rate."""
    optimizer = optimizer_for(
        learning_rates={"vision": 1e-3, "projector": None, "llm": 2e-5}, warmup_ratio=0.0, clip=0.0
    )
    trainable, _ = split(PARAMS, optimizer.mask)
    ones = jax.tree.map(np.ones_like, trainable)
    new, _ = first_update(optimizer, ones, trainable)
    for path, change in flatten(jax.tree.map(jnp.subtract, trainable, new)).items():
        rate = {"vision": 1e-3, "llm": 2e-5}[path.split("/")[0]]
        np.testing.assert_allclose(change, rate, rtol=0.02, atol=3e-7, err_msg=path)
    learning_rates = optimizer.learning_rates(jnp.int32(10))
    np.testing.assert_allclose(
        [learning_rates["vision"], learning_rates["projector"], learning_rates["llm"]], [5e-4, 0, 1e-5], rtol=1e-6
    )


def test_biases_and_norms_have_no_weight_decay():
    optimizer = optimizer_for(weight_decay=0.1, warmup_ratio=0.0)
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    new, _ = first_update(optimizer, zeros)
    old, new = flatten(PARAMS), flatten(new)
    for path in old:
        factor = 1 if path.endswith(("bias", "scale")) else 1 - 1e-4
        np.testing.assert_allclose(new[path], old[path] * np.float32(factor), rtol=1e-6, err_msg=path)


def test_gradients_are_clipped_by_their_global_norm():
    big = jax.tree.map(lambda leaf: np.full_like(leaf, 100), PARAMS)
    norm = 100 * math.sqrt(sum(leaf.size for leaf in jax.tree.leaves(PARAMS)))
    states = []
    for clip, gradient in ((1.0, big), (0.0, jax.tree.map(lambda leaf: leaf / np.float32(norm), big))):
        optimizer = optimizer_for(clip=clip)
        states.append(first_update(optimizer, gradient)[1])
    moments = [flatten(state) for state in states]
    first = next(path for path in moments[0] if path.endswith("mu/llm/norm/scale"))
    second = next(path for path in moments[1] if path.endswith("mu/llm/norm/scale"))
    np.testing.assert_allclose(moments[0][first], moments[1][second], rtol=1e-4)


def test_frozen_parameters_have_no_state():
    optimizer = optimizer_for(learning_rates={"vision": 0.0, "projector": 1e-3, "llm": None})
    state = jax.eval_shape(optimizer.init, PARAMS)
    moments = {path for path in flatten(state) if not path.endswith("count")}
    assert moments
    assert all("/projector/" in path for path in moments)
    projector = sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS["projector"]))
    assert sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(state)) - 2 * projector <= 16


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_have_their_types(kind):
    low = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), PARAMS)
    state = flatten(jax.eval_shape(optimizer_for(kind=kind, first_moment_dtype="bfloat16").init, low))
    first = {leaf.dtype for path, leaf in state.items() if "/mu/" in path}
    second = {leaf.dtype for path, leaf in state.items() if "/nu/" in path}
    assert (first, second) == ({jnp.dtype("bfloat16")}, {jnp.dtype("float32")})


def test_muon_updates_matrices_only():
    dimensions = {path: matrix_dimensions(path, leaf.ndim) for path, leaf in flatten(PARAMS).items()}
    assert dimensions["llm/layers/attn/q/kernel"] == ((1,), (2, 3))
    assert dimensions["vision/layers/attn/out/kernel"] == ((1, 2), (3,))
    assert dimensions["llm/layers/mlp/down/kernel"] == ((1,), (2,))
    assert dimensions["projector/fc2/kernel"] == ((0,), (1,))
    assert dimensions["vision/patch_embed/kernel"] == ((0,), (1,))
    for path in ("llm/embed/embedding", "llm/norm/scale", "llm/layers/attn/q/bias"):
        assert dimensions[path] is None
    assert matrix_dimensions("llm/lm_head/kernel", 2) is None
    assert matrix_dimensions("llm/layers/attn/q/kernel/a", 3) is None
    state = flatten(jax.eval_shape(optimizer_for(kind="muon").init, PARAMS))
    assert not any(path.endswith("nu/llm/layers/mlp/up/kernel") for path in state)
    assert any(path.endswith("nu/llm/embed/embedding") for path in state)


def test_muon_updates_are_orthogonal_with_the_size_of_adamw_updates():
    optimizer = optimizer_for(kind="muon", warmup_ratio=0.0)
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), PARAMS)
    new, _ = first_update(optimizer, gradients)
    for kernel, shape in (("attn", "out"), (64, 64)), (("mlp", "up"), (64, 128)):
        old, changed = (tree["llm"]["layers"][kernel[0]][kernel[1]]["kernel"] for tree in (PARAMS, new))
        matrix = (np.asarray(changed) - old)[1].reshape(shape) / 1e-3
        singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(max(shape)))
        # Newton-Schulz brings all singular values close to 1, except those close to 0.
        assert np.mean((singular > 0.5) & (singular < 1.5)) > 0.95
        assert 0.1 < np.sqrt(np.mean(matrix**2)) < 0.3


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_are_sharded_like_their_parameters(kind):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shapes = jax.eval_shape(functools.partial(add_adapters, rank=4), PARAMS, jax.random.key(0))
    learning_rates = LEARNING_RATES | {"lora": 1e-3}
    optimizer = make_optimizer(OptimizerConfig(learning_rates, WITH_LORA, kind), shapes, steps=10)
    state = jax.eval_shape(functools.partial(new_state, optimizer), shapes)
    shardings = state_shardings(state, MODEL.config, mesh)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    params, moments = flatten(shardings.params), flatten(shardings.opt_state)
    assert params["llm/layers/attn/q/kernel/base"].spec == P(None, "fsdp", "tensor", None)
    assert params["llm/layers/attn/q/kernel/a"].spec == P(None, "fsdp", None)
    assert params["llm/layers/attn/q/kernel/b"].spec == P(None, None, "tensor", "fsdp")
    for path, sharding in moments.items():
        owner = next((name for name in params if path.endswith(f"/{name}")), None)
        if owner is None:
            assert sharding.is_fully_replicated
        else:
            assert sharding == params[owner], path
    assert sum(any(path.endswith(f"/{name}") for name in params) for path in moments) >= len(params)


def test_the_state_of_the_7b_model_divides_over_64_chips():
    """With AdamW in float32, a chip holds a 64th of the state."""
    config = preset("7b")
    shapes = abstract_params(config)
    optimizer = make_optimizer(OptimizerConfig(LEARNING_RATES), shapes, steps=10)
    state = jax.eval_shape(functools.partial(new_state, optimizer), shapes)
    mesh = jax.sharding.AbstractMesh((1, 64, 1, 1), ("data", "fsdp", "tensor", "context"))
    shardings = state_shardings(state, config, mesh)
    device_bytes = sum(
        4 * math.prod(sharding.shard_shape(leaf.shape))
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
    )
    print(f"7B over 64: {device_bytes / 1e9:.2f} GB a device")
    assert device_bytes <= 1.05 * 12 * num_parameters(shapes) / 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "sgd"}, "kind is 'sgd'; use one of adamw, muon"),
        ({"steps": 0}, "steps is 0"),
        ({"warmup_ratio": 2.0}, "warmup_ratio is 2.0"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"groups": MODULES[:1]}, "is in no group"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        optimizer_for(**settings)


def test_int8_parameters_cannot_be_trained():
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.int8), PARAMS)
    with pytest.raises(InputError, match="is int8 and cannot be trained; freeze its group"):
        optimizer_for(shapes)


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("sqrt", 2.0), ("linear", 4.0)])
def test_learning_rates_follow_the_samples_of_a_step(scaling, factor):
    config = OptimizerConfig({"vision": None, "projector": 1e-3, "llm": 0.0}, scale_with_batch=scaling)
    assert config.for_batch(4.0).learning_rates == {"vision": None, "projector": factor * 1e-3, "llm": 0.0}
    assert config.for_batch(1.0) == config


def test_an_unknown_scaling_is_refused():
    with pytest.raises(InputError, match="scale_with_batch is 'half'; use one of none, sqrt, linear"):
        OptimizerConfig({}, scale_with_batch="half")
