"""What else has a SAM-2 in it: files of Meta, alone or beside each other, and Sa2VA."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from support.sam2_folders import random_sam2_tensors, small_sam2
from vl3_jax.checkpoint import load, open_source, sam2_hf_config
from vl3_jax.checkpoint.sam2_names import SA2VA
from vl3_jax.cli.main import main
from vl3_jax.sam2.sam2_config import sa2va_settings


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Takes a small model for the released ones, which are recognised by the shapes of their weights."""
    monkeypatch.setattr(sam2_hf_config, "sam2_preset", lambda size, version: small_sam2(version))


@pytest.fixture
def sa2va(tmp_path):
    """A folder as Sa2VA is released: its config.json is of the language model, whose tensors are beside SAM-2's."""
    folder = tmp_path / "sa2va"
    folder.mkdir()
    rest = ("language_model.model.norm.weight", "text_hidden_fcs.0.weight", "vision_model.embeddings.class_embedding")
    tensors = random_sam2_tensors(small_sam2("2.0"), SA2VA)
    save_file(tensors | {name: np.ones(3, np.float32) for name in rest}, folder / "model.safetensors")
    config = {"model_type": "sa2va_chat", "architectures": ["Sa2VAChatModel"], "template": "qwen_chat"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def test_the_grounding_part_of_sa2va(sa2va, tmp_path, caplog, capsys):
    """It is converted, exported, listed and compared like any SAM-2, with Sa2VA's settings, and the rest is named."""
    config, out = sa2va_settings(small_sam2("2.0")), tmp_path / "orbax"
    assert main(["convert", "hf", str(sa2va), str(out)]) == 0
    error = capsys.readouterr().err
    assert "only the SAM-2 of this Sa2VA is read; its language model is not VideoLLaMA3's" in error
    assert load(out).config == load(sa2va).config == config
    assert main(["convert", "verify", str(sa2va), str(out), "--no-logits"]) == 0
    assert main(["convert", "inspect", str(sa2va)]) == 0
    assert "language_model" not in capsys.readouterr().out
    assert main(["convert", "export", str(out), str(tmp_path / "meta"), "--format", "official"]) == 0
    assert "the export runs as stock SAM-2" in capsys.readouterr().err
    exported, stored = load_file(tmp_path / "meta" / "model.safetensors"), load_file(sa2va / "model.safetensors")
    prefix = "grounding_encoder.sam2_model."
    assert len(exported) == sum(name.startswith(prefix) for name in stored)
    for name, tensor in exported.items():
        np.testing.assert_array_equal(tensor, stored[prefix + name.replace(".gamma", ".g_weight")], err_msg=name)


def test_the_rest_of_sa2va_is_refused(sa2va, capsys):
    assert main(["ask", "--model", str(sa2va), "Who is there?"]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert "a Sa2VA, of which only the SAM-2 can be read: its language model is not VideoLLaMA3's" in line


def test_files_of_meta(tmp_path, capsys):
    """A file alone is a model; of a folder with several, one has to be named; what else is there does not matter."""
    torch = pytest.importorskip("torch")
    for name, version in (("sam2_hiera_tiny.pt", "2.0"), ("sam2.1_hiera_tiny.pt", "2.1")):
        tensors = random_sam2_tensors(small_sam2(version), "sam2-meta")
        torch.save({"model": {key: torch.tensor(value) for key, value in tensors.items()}}, tmp_path / name)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for name, version in (("sam2_hiera_tiny.pt", "2.0"), ("sam2.1_hiera_tiny.pt", "2.1")):
        assert open_source(tmp_path / name).config == small_sam2(version)
    assert main(["convert", "hf", str(tmp_path / "sam2.1_hiera_tiny.pt"), str(tmp_path / "orbax")]) == 0
    assert main(["convert", "verify", str(tmp_path / "sam2.1_hiera_tiny.pt"), str(tmp_path / "orbax")]) == 0
    capsys.readouterr()
    assert main(["convert", "inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "several models of SAM-2 (sam2.1_hiera_tiny.pt, sam2_hiera_tiny.pt); give one of these files" in error
    (tmp_path / "other.pt").write_bytes(b"no pickle")
    assert main(["convert", "inspect", str(tmp_path / "other.pt")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
