"""Initial checkpoints of stage 1, projector-only runs and LoRA runs."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from support.hf_folders import (
    DTYPES,
    random_tensors,
    siglip_extras,
    tiny,
    write_folder,
    write_json,
)
from vl3_jax.checkpoint import load, name_map, open_source
from vl3_jax.cli.main import main

torch = pytest.importorskip("torch")


def convert(*arguments) -> int:
    return main(["convert", *map(str, arguments)])


def slice_of(folder, leaf: str, layer: int | None = None) -> np.ndarray:
    return open_source(folder).slice(leaf, layer).read().result()


@pytest.mark.parametrize("vision", ["siglip", "siglip_vision_model", "navit", "official"])
@pytest.mark.parametrize("tied", [True, False])
def test_init_from_any_tower(tmp_path, vision, tied):
    config = tiny(tied)
    layout = "siglip" if vision.startswith("siglip") else vision
    extra = siglip_extras(config) if vision == "siglip" else {}
    change = None
    if vision == "siglip_vision_model":
        extra = {"vision_model.embeddings.position_embedding.weight": np.ones((4, 64), np.float32)}
        change = {"model_type": "siglip_vision_model", **json.loads(json.dumps(vision_fields(config)))}
    tower = write_folder(tmp_path / "tower", layout, config, "float32", seed=1, extra=extra, change=change)
    decoder = write_folder(tmp_path / "qwen", "qwen2", config, "bfloat16", seed=2)
    command = ["init", "--vision", tmp_path / "tower", "--llm", tmp_path / "qwen"]
    assert convert(*command, tmp_path / "init", "--seed", 3) == 0
    checkpoint = load(tmp_path / "init")
    assert checkpoint.config == config
    assert checkpoint.source.files_kind == "official"
    for source_layout, tensors, part in ((layout, tower, "vision"), ("qwen2", decoder, "llm")):
        for name, spec in name_map(source_layout, config).tensors.items():
            if spec.part in (part, "head" if part == "llm" else part):
                actual = slice_of(tmp_path / "init", spec.leaf, spec.layer)
                np.testing.assert_array_equal(actual, spec.to_leaf(tensors[name]))
    kernel = slice_of(tmp_path / "init", "projector/fc1/kernel").astype(np.float32)
    bound = 1 / math.sqrt(64)
    assert 0.9 * bound < np.abs(kernel).max() <= bound * 1.01
    content = json.loads((checkpoint.files / "config.json").read_text())
    assert content["model_type"] == "videollama3_qwen2"
    assert content["image_token_index"] == 502  # the id after the tokenizer's last one
    assert convert(*command, tmp_path / "again", "--seed", 3) == 0
    assert convert(*command, tmp_path / "other", "--seed", 4) == 0
    again, other = (slice_of(tmp_path / name, "projector/fc1/kernel") for name in ("again", "other"))
    np.testing.assert_array_equal(again.astype(np.float32), kernel)
    assert not np.array_equal(other.astype(np.float32), kernel)
    assert convert("export", tmp_path / "init", tmp_path / "native", "--format", "native") == 0


def vision_fields(config) -> dict:
    from support.hf_folders import vision_json

    return vision_json(config)


def test_init_names_the_wrong_input(tmp_path, capfd):
    write_folder(tmp_path / "qwen", "qwen2", tiny())
    assert convert("init", "--vision", tmp_path / "qwen", "--llm", tmp_path / "qwen", tmp_path / "o") == 2
    assert "--vision" in capfd.readouterr().err


@pytest.mark.parametrize("base_layout", ["official", "official-train", "native"])
@pytest.mark.parametrize("extra_kind", ["bin", "none"])
def test_lora_is_merged(tmp_path, base_layout, extra_kind):
    config = tiny(tied=False)
    base = write_folder(tmp_path / "base", base_layout, config, "float32")
    rng = np.random.default_rng(5)
    rank, alpha = 4, 16
    prefix = {"native": "model.language_model."}.get(base_layout, "model.")
    adapter, merged = {}, dict(base)
    for module in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"):
        name = f"{prefix}{module}.weight"
        a = rng.standard_normal((rank, base[name].shape[1]), np.float32)
        b = rng.standard_normal((base[name].shape[0], rank), np.float32)
        adapter |= {
            f"base_model.model.{prefix}{module}.lora_A.weight": a,
            f"base_model.model.{prefix}{module}.lora_B.weight": b,
        }
        merged[name] = base[name] + alpha / rank * (b @ a)
    run = tmp_path / "run"
    run.mkdir()
    save_file(adapter, run / "adapter_model.safetensors")
    base_name = str(tmp_path / "base")
    write_json(
        run / "adapter_config.json",
        {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "base_model_name_or_path": base_name},
    )
    if extra_kind == "bin" and base_layout != "native":
        name = "model.mm_projector.readout.0.weight"
        merged[name] = base[name] + 1
        torch.save({f"base_model.model.{name}": torch.tensor(merged[name])}, run / "non_lora_trainables.bin")
    assert convert("hf", run, tmp_path / "o") == 0
    for name, spec in name_map(base_layout, config).tensors.items():
        actual = slice_of(tmp_path / "o", spec.leaf, spec.layer)
        # The trainer's files do not store the tower's number of heads; its bytes are the same for any number.
        expected = spec.to_leaf(merged[name]).reshape(actual.shape)
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_lora_that_does_not_fit_is_refused(tmp_path, capfd):
    write_folder(tmp_path / "base", "official", tiny())
    run = tmp_path / "run"
    run.mkdir()
    save_file(
        {"base_model.model.model.nothing.lora_A.weight": np.ones((2, 2), np.float32)}, run / "adapter_model.safetensors"
    )
    write_json(run / "adapter_config.json", {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "missing/base"})
    assert convert("hf", run, tmp_path / "o", "--base", tmp_path / "base") == 2
    assert "not in the base: model.nothing.weight" in capfd.readouterr().err


@pytest.mark.parametrize("base_layout", ["official", "qwen2"])
def test_projector_is_joined_with_its_base(tmp_path, base_layout):
    config = tiny()
    base = write_folder(tmp_path / "base", base_layout, config)
    navit = write_folder(tmp_path / "tower", "navit", config, seed=7)
    run = tmp_path / "run"
    run.mkdir()
    projector = {
        name: tensor.astype(np.float32)
        for name, tensor in random_tensors("official", config, seed=9).items()
        if "mm_projector" in name
    }
    state = {f"base_model.{name}": torch.tensor(tensor).bfloat16() for name, tensor in projector.items()}
    torch.save(state, run / "mm_projector.bin")
    write_folder(tmp_path / "shape", "official-train", config)
    content = json.loads((tmp_path / "shape" / "config.json").read_text())
    content |= {"_name_or_path": str(tmp_path / "base"), "vision_encoder": str(tmp_path / "tower")}
    write_json(run / "config.json", content)
    assert convert("hf", run, tmp_path / "o") == 0
    names = name_map("official", config)
    for name, tensor in projector.items():
        spec = names.tensors[name]
        np.testing.assert_array_equal(
            slice_of(tmp_path / "o", spec.leaf), spec.to_leaf(tensor.astype(DTYPES["bfloat16"]))
        )
    embedding = slice_of(tmp_path / "o", "llm/embed/embedding")
    np.testing.assert_array_equal(embedding, base["model.embed_tokens.weight"])
    bias = navit["post_layernorm.bias"] if base_layout == "qwen2" else base["model.vision_encoder.post_layernorm.bias"]
    np.testing.assert_array_equal(slice_of(tmp_path / "o", "vision/post_ln/bias"), bias)
    for layout in ("official", "native"):
        assert convert("export", tmp_path / "o", tmp_path / layout, "--format", layout) == 0


def test_tower_alone(tmp_path, capsys):
    """A tower alone can be converted and inspected, but not exported."""
    write_folder(tmp_path / "tower", "navit", tiny())
    assert convert("hf", tmp_path / "tower", tmp_path / "o") == 0
    assert set(load(tmp_path / "o").params) == {"vision"}
    assert convert("inspect", tmp_path / "o") == 0
    assert "104,768" in capsys.readouterr().out
    assert convert("export", tmp_path / "o", tmp_path / "b", "--format", "native") == 2
