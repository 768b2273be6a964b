"""Folders as people have them: read as transformers reads them, or refused with the reason."""

import json
import shutil

import numpy as np
import pytest

from support.hf_folders import random_tensors, tiny, write_folder, write_json
from vl3_jax.checkpoint import load, name_map, open_source
from vl3_jax.cli.main import main
from vl3_jax.errors import InputError

EMBED = "llm/embed/embedding"
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"


def assert_as_transformers(folder) -> None:
    """Asserts that every parameter is the one that transformers has."""
    reference = pytest.importorskip("support.reference")
    model, info = reference.VideoLlama3ForConditionalGeneration.from_pretrained(
        folder, dtype=reference.torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    state, source = model.state_dict(), open_source(folder)
    for name, spec in name_map("native", source.config).tensors.items():
        ours = np.asarray(source.slice(spec.leaf, spec.layer).read().result(), np.float32)
        np.testing.assert_array_equal(ours, spec.to_leaf(state[name].numpy()), err_msg=name)
    if source.config.text.tie_word_embeddings:
        assert state[HEAD].data_ptr() == state[EMBEDDING].data_ptr()


def refusal(folder, tmp_path, capfd) -> str:
    """Asserts that a conversion, and loading, are refused; returns the line of the conversion."""
    capfd.readouterr()
    assert main(["convert", "hf", str(folder), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError):
        load(folder)
    return capfd.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "in", "native", tiny(), "float32", seed=1)
    return tmp_path / "in"


def test_stale_index_beside_a_single_file(tmp_path, folder, caplog):
    write_folder(tmp_path / "old", "native", tiny(), "float32", seed=2, shards=2)
    for file in (tmp_path / "old").glob("model*"):
        shutil.copy(file, folder)
    assert_as_transformers(folder)
    assert "model.safetensors is read" in caplog.text
    assert "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors" in caplog.text


def test_safetensors_beside_pickles(folder, caplog):
    torch = pytest.importorskip("torch")
    old = random_tensors("native", tiny(), "float32", seed=2)
    torch.save({name: torch.tensor(array) for name, array in old.items()}, folder / "pytorch_model.bin")
    assert_as_transformers(folder)
    assert "passed over, as transformers does: pytorch_model.bin" in caplog.text


def test_index_with_shards_of_two_models(tmp_path, caplog):
    folder = tmp_path / "in"
    write_folder(folder, "native", tiny(), "float32", seed=1, shards=2)
    write_folder(tmp_path / "old", "native", tiny(), "float32", seed=2, shards=3)
    for file in (tmp_path / "old").glob("model-*"):
        shutil.copy(file, folder)
    assert_as_transformers(folder)
    assert "model-00003-of-00003.safetensors" in caplog.text


def test_dangling_shard(tmp_path, capfd):
    write_folder(tmp_path / "in", "native", tiny(), shards=2)
    (tmp_path / "in" / "model-00002-of-00002.safetensors").unlink()
    line = refusal(tmp_path / "in", tmp_path, capfd)
    assert "missing shard model-00002-of-00002.safetensors, named by model.safetensors.index.json" in line


@pytest.mark.parametrize("layout", ["native", "official"])
@pytest.mark.parametrize("head", ["absent", "equal", "differs"])
def test_heads_of_tied_embeddings(tmp_path, layout, head, caplog):
    """A head that differs is kept, as by transformers, and dropped in the layout of the released code, as by that."""
    config, folder = tiny(tied=True), tmp_path / "in"
    embedding = random_tensors(layout, config, "float32", seed=1)[
        name_map(layout, config).leaves[EMBED].tensors[0].name
    ]
    heads = {"absent": {}, "equal": {HEAD: embedding.copy()}, "differs": {HEAD: embedding[::-1].copy()}}
    write_folder(folder, layout, config, "float32", seed=1, extra=heads[head])
    source, kept = open_source(folder), head == "differs" and layout == "native"
    assert source.config.text.tie_word_embeddings != kept
    assert ("kept, as transformers" in caplog.text) == kept
    assert ("dropped, as the released code" in caplog.text) == (head == "differs" and not kept)
    if layout == "native":
        assert_as_transformers(folder)
    # What is kept survives a round trip, and its config.json says so.
    assert main(["convert", "hf", str(folder), str(tmp_path / "o")]) == 0
    assert main(["convert", "export", str(tmp_path / "o"), str(tmp_path / "back"), "--format", "native"]) == 0
    assert_as_transformers(tmp_path / "back")
    config_json = json.loads((tmp_path / "back" / "config.json").read_text())
    tied = config_json.get("tie_word_embeddings") or config_json["text_config"]["tie_word_embeddings"]
    assert tied != kept


def test_untied_head_is_missing(tmp_path, capfd):
    tensors = random_tensors("native", tiny(tied=False))
    del tensors[HEAD]
    write_folder(tmp_path / "in", "native", tiny(tied=False), tensors=tensors)
    assert f"missing: {HEAD}" in refusal(tmp_path / "in", tmp_path, capfd)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_has_grown_beyond_the_table(tmp_path, folder, capfd, file):
    content = json.loads((folder / file).read_text())
    if file == "tokenizer.json":
        content["added_tokens"].append({"id": 512, "content": "<new>"})
    else:
        content["added_tokens_decoder"]["512"] = {"content": "<new>"}
    write_json(folder / file, content)
    line = refusal(folder, tmp_path, capfd)
    assert "token id 512, and the embedding table has 512 rows" in line
    settings = ["--config", "finetune:mock", f"--config.init_from={folder}", "--workdir", str(tmp_path / "run")]
    assert main(["train", *settings]) == 2
    assert "token id 512" in capfd.readouterr().err


def test_quantised_weights(tmp_path, folder, capfd):
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    assert "quantised (gptq)" in refusal(folder, tmp_path, capfd)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_a_wrapped_model(tmp_path, prefix, capfd):
    tensors = {f"{prefix}{name}": array for name, array in random_tensors("native", tiny()).items()}
    write_folder(tmp_path / "in", "native", tiny(), tensors=tensors)
    line = refusal(tmp_path / "in", tmp_path, capfd)
    assert f"{prefix}model." in line
    assert "wrapped model" in line


@pytest.mark.parametrize("tower", [None, "x" * 300])
def test_trainer_output_read_from_within(tmp_path, tower, monkeypatch):
    """Without a tower's folder its sizes are those of the weights, whatever lies in the working folder."""
    write_folder(tmp_path / "in", "official-train", tiny(), change={"vision_encoder": tower})
    monkeypatch.chdir(tmp_path / "in")
    assert open_source(".").config.vision == open_source(tmp_path / "in").config.vision
    assert open_source(".").config.vision.hidden_size == tiny().vision.hidden_size


def test_parent_of_the_checkpoints_of_a_run(tmp_path, capfd):
    (tmp_path / "in").mkdir()
    for step in (9, 10):
        write_folder(tmp_path / "in" / f"checkpoint-{step}", "native", tiny())
    assert "give checkpoint-10 of it" in refusal(tmp_path / "in", tmp_path, capfd)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", 0.0),
        ("rms_norm_eps", -1e-6),
        ("rope_theta", float("inf")),
        ("rope_theta", "10000"),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 4.0),
        ("vocab_size", True),
    ],
)
def test_impossible_constants(tmp_path, folder, key, value, capfd):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][key] = value
    write_json(folder / "config.json", config)
    line = refusal(folder, tmp_path, capfd)
    assert f"config.json: text_config.{key} is {value!r}; expected" in line


def test_wrong_shapes_and_dtypes_are_folded_by_layer(tmp_path, capfd):
    tensors = random_tensors("native", tiny())
    for layer in (0, 1):
        tensors[f"model.language_model.layers.{layer}.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)
        name = f"model.vision_model.encoder.layers.{layer}.mlp.fc1.bias"
        tensors[name] = tensors[name].astype(np.int32)
    write_folder(tmp_path / "in", "native", tiny(), tensors=tensors)
    line = refusal(tmp_path / "in", tmp_path, capfd)
    assert "model.language_model.layers.{0-1}.mlp.up_proj.weight (3, 4) instead of (128, 64)" in line
    assert "model.vision_model.encoder.layers.{0-1}.mlp.fc1.bias int32" in line


def test_control_characters_in_names_are_escaped(tmp_path, capfd):
    write_folder(tmp_path / "in", "native", tiny(), extra={"model.\x1b[31m\nx": np.ones(1, np.float32)})
    assert r"unexpected: model.\x1b[31m\nx" in refusal(tmp_path / "in", tmp_path, capfd)
