"""LoRA adapters: initialisation, training, merging and export as a PEFT folder."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import MODEL, Run, logits, optimizer_for, run_jitted, short_batch, start_params

from support.hf_folders import write_folder
from support.tolerances import REORDERED, relative_error
from vl3_jax.checkpoint import load, name_map, write_adapters
from vl3_jax.errors import InputError
from vl3_jax.model.linear import LoraKernel
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.parallel.rules import batch_shardings
from vl3_jax.training.groups import WITH_LORA, flatten
from vl3_jax.training.lora import LLM, TOWER, add_adapters, merge_adapters, remove_adapters
from vl3_jax.training.state import new_state, state_shardings
from vl3_jax.training.step import batch_loss

PARAMS = start_params()
LEARNING_RATES = {"vision": None, "projector": 1e-3, "llm": None, "lora": 5e-3}


@pytest.fixture(scope="module")
def trained() -> tuple[Run, dict]:
    """Trains adapters on decoder and tower, and the whole projector, for a few steps."""
    params = add_adapters(PARAMS, jax.random.key(0), LLM + TOWER, rank=4, alpha=8.0)
    optimizer = optimizer_for(params, groups=WITH_LORA, learning_rates=LEARNING_RATES, warmup_ratio=0.0)
    run = Run(optimizer, short_batch(), params)
    losses = run.steps(8)
    assert losses[-1] < 0.9 * losses[0]
    return run, optimizer.mask


def test_new_adapters_do_not_change_the_model():
    adapted = add_adapters(PARAMS, jax.random.key(0))
    assert sum(isinstance(node, LoraKernel) for node in _nodes(adapted)) == 7
    q = adapted["llm"]["layers"]["attn"]["q"]["kernel"]
    assert (q.a.shape, q.b.shape, q.scale) == ((2, 64, 64), (2, 64, 4, 16), 16 / 64)
    out = adapted["llm"]["layers"]["attn"]["out"]["kernel"]
    assert (out.a.shape, out.b.shape) == ((2, 4, 16, 64), (2, 64, 64))
    assert not np.any(out.b)
    assert 0.9 / 8 < np.abs(out.a).max() <= 1 / 8  # uniform up to 1/sqrt(64 inputs)
    np.testing.assert_array_equal(logits(adapted, short_batch()), logits(PARAMS, short_batch()))
    assert all(a is b for a, b in zip(_nodes(remove_adapters(adapted)), jax.tree.leaves(PARAMS), strict=True))


def test_only_trainable_parameters_change(trained):
    run, mask = trained
    before, after = flatten(add_adapters(PARAMS, jax.random.key(0), LLM + TOWER, rank=4)), flatten(run.state.params)
    for path, is_trainable in flatten(mask).items():
        assert is_trainable == (path.endswith(("/a", "/b")) or path.startswith("projector"))
        assert is_trainable != np.array_equal(before[path], after[path]), path


def test_merged_parameters_equal_the_adapted_model(trained):
    run, _ = trained
    merged = merge_adapters(run.state.params)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    merged_logits, adapted, plain = (logits(p, short_batch()) for p in (merged, run.state.params, PARAMS))
    assert relative_error(merged_logits, adapted) <= REORDERED
    assert relative_error(plain, adapted) > 0.1


@pytest.mark.parametrize("layout", ["official", "native"])
def test_a_peft_folder_loads_as_the_merged_model(trained, tmp_path, layout):
    run, mask = trained
    names = name_map(layout, MODEL.config)
    leaves = flatten(PARAMS)
    tensors = {
        name: np.ascontiguousarray(
            spec.to_tensor(leaves[spec.leaf] if spec.layer is None else leaves[spec.leaf][spec.layer])
        )
        for name, spec in names.tensors.items()
    }
    write_folder(tmp_path / "base", layout, MODEL.config, "float32", tensors=tensors)
    state = run.state.params
    write_adapters(tmp_path / "run", state, MODEL.config, base=str(tmp_path / "base"), layout=layout, whole=mask)
    loaded = flatten(load(tmp_path / "run").params)
    for path, leaf in flatten(merge_adapters(state)).items():
        np.testing.assert_allclose(loaded[path], leaf, rtol=1e-6, atol=1e-6, err_msg=path)

    content = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (content["r"], content["lora_alpha"], content["lora_dropout"], content["bias"]) == (4, 8.0, 0.0, "none")
    stored = load_file(tmp_path / "run" / "adapter_model.safetensors")
    adapted = {name.split("base_model.model.")[1].split(".lora_")[0] for name in stored if ".lora_" in name}
    modules = {name.removesuffix(".weight") for name in names.tensors}
    assert {module for module in modules if re.fullmatch(content["target_modules"], module)} == adapted
    assert len(adapted) == 2 * 7 + 2 * 3  # layers of decoder and tower
    assert len(content["modules_to_save"]) == 2  # the projector's linear layers
    assert all(stored[name].dtype == np.float32 for name in stored)


@pytest.mark.slow
def test_adapters_are_sharded_with_their_kernels():
    """On a mesh the loss is the same and every leaf is split."""
    params = add_adapters(PARAMS, jax.random.key(0), rank=8)
    optimizer = optimizer_for(params, groups=WITH_LORA, learning_rates=LEARNING_RATES)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    state = run_jitted(lambda: new_state(optimizer, params))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(state, state_shardings(state, MODEL.config, mesh)).params
        batch = jax.device_put(short_batch(), batch_shardings(short_batch(), mesh))
        loss = run_jitted(lambda p, b: batch_loss(MODEL, p, b).loss, sharded, batch)
    expected = run_jitted(lambda p, b: batch_loss(MODEL, p, b).loss, params, short_batch())
    assert abs(loss - expected) <= REORDERED * expected
    assert all(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": ("llm/layers/attn/w/kernel",)}, "no kernel matches 'llm/layers/attn/w/kernel'"),
        ({"patterns": ("llm/layers/attn/q/bias",)}, "no kernel matches"),
        ({"rank": 0}, "rank of adapters is 0"),
    ],
)
def test_invalid_adapters_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        add_adapters(PARAMS, jax.random.key(0), **options)


def test_a_peft_folder_holds_one_rank(tmp_path):
    mixed = add_adapters(PARAMS, jax.random.key(0), LLM[:1], rank=2)
    mixed = add_adapters(mixed, jax.random.key(0), LLM[1:], rank=4)
    for params, message in ((mixed, "found rank 2 scale 8.0, rank 4 scale 4.0"), (PARAMS, "found none")):
        with pytest.raises(InputError, match=message):
            write_adapters(tmp_path, params, MODEL.config, base="base")


def _nodes(tree):
    return jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, LoraKernel))
