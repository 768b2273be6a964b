"""Bad input is refused with one line and exit code 2, and leaves nothing that looks complete."""

import errno
import json
import os
import pickle
import shutil
import struct
import zipfile

import numpy as np
import pytest

from support.hf_folders import (
    assert_same_tensors,
    read_tensors,
    renamed,
    tiny,
    write_folder,
    write_json,
)
from vl3_jax.checkpoint import open_source
from vl3_jax.cli.main import main
from vl3_jax.errors import InputError


def convert(*arguments) -> int:
    return main(["convert", *map(str, arguments)])


def assert_refused(tmp_path, capfd, *words: str, source="in", arguments=()) -> str:
    """Runs `vl3 convert hf` and asserts that it fails with one line that contains all `words`; returns the line."""
    capfd.readouterr()
    assert convert("hf", tmp_path / source, tmp_path / "out", *arguments) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("vl3 ")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0], lines[0]
    assert not (tmp_path / "out").exists()
    return lines[0]


@pytest.fixture
def sharded(tmp_path):
    write_folder(tmp_path / "in", "official", tiny(), shards=3)
    return tmp_path / "in"


def test_missing_shard(tmp_path, capfd, sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert_refused(tmp_path, capfd, "missing shard model-00002-of-00003.safetensors", "download")
    (sharded / "model.safetensors.index.json").unlink()
    assert_refused(tmp_path, capfd, "missing shard model-00002-of-00003.safetensors")


def test_all_missing_files_of_an_index_are_listed(tmp_path, capfd, sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {"model.x": "nowhere-1.safetensors", "model.y": "nowhere-2.safetensors"}
    write_json(sharded / "model.safetensors.index.json", index)
    assert_refused(tmp_path, capfd, "nowhere-1.safetensors, nowhere-2.safetensors", "model.safetensors.index.json")


def test_index_naming_a_missing_tensor_or_a_file_outside(tmp_path, capfd, sharded):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    write_json(path, {"weight_map": index["weight_map"] | {"model.x": "model-00001-of-00003.safetensors"}})
    assert_refused(tmp_path, capfd, "model.x not in the shard")
    write_json(path, {"weight_map": {"model.x": "../other.safetensors"}})
    assert_refused(tmp_path, capfd, "outside its folder")


def test_truncated_safetensors(tmp_path, capfd):
    write_folder(tmp_path / "in", "official", tiny())
    path = tmp_path / "in" / "model.safetensors"
    content = path.read_bytes()
    for size, words in ((len(content) - 100, "truncated"), (4, "only 4 bytes"), (30, "header of")):
        path.write_bytes(content[:size])
        assert_refused(tmp_path, capfd, str(path), words)


def test_header_longer_than_the_file(tmp_path, capfd):
    write_folder(tmp_path / "in", "official", tiny())
    path = tmp_path / "in" / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 10**12) + path.read_bytes()[8:])
    assert_refused(tmp_path, capfd, str(path), "announces a header of 1000000000000 bytes")


def test_all_tensor_errors_are_listed_at_once(tmp_path, capfd):
    config = tiny()
    tensors = write_folder(tmp_path / "good", "official", config)
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = np.ones(3, tensors["model.norm.weight"].dtype)
    tensors["model.vision_encoder.post_layernorm.bias"] = np.ones(64, np.int32)
    write_folder(tmp_path / "in", "official", config, tensors=tensors | {"model.strange": np.ones(1, np.float32)})
    assert_refused(
        tmp_path,
        capfd,
        "missing: model.layers.{0-1}.mlp.up_proj.weight",
        "unexpected: model.strange",
        "wrong shape: model.norm.weight (3,) instead of (64,)",
        "model.vision_encoder.post_layernorm.bias int32",
    )


def test_siglip_text_tower_is_not_droppable_elsewhere(tmp_path, capfd):
    write_folder(tmp_path / "in", "official", tiny(), extra={"text_model.x": np.ones(1, np.float32)})
    assert_refused(tmp_path, capfd, "unexpected: text_model.x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llava"}, "model_type is 'llava'; expected one of videollama3_qwen2"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope type 'yarn'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_key_value_heads": 3}, "4 query heads"),
    ],
)
def test_unsupported_configuration(tmp_path, capfd, change, words):
    write_folder(tmp_path / "in", "official", tiny(), change=change)
    assert_refused(tmp_path, capfd, "config.json", words)


def test_invalid_json_names_the_line(tmp_path, capfd):
    write_folder(tmp_path / "in", "official", tiny())
    (tmp_path / "in" / "config.json").write_text('{\n "a": 1,\n oops\n}')
    assert_refused(tmp_path, capfd, "config.json:3")


def test_missing_and_empty_folder(tmp_path, capfd):
    assert_refused(tmp_path, capfd, "no such folder")
    (tmp_path / "in").mkdir()
    assert_refused(tmp_path, capfd, "no weights")


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "a\0b"], ids=["name", "path", "null"])
def test_names_that_no_folder_can_have(name):
    with pytest.raises(InputError, match="no such folder"):
        open_source(name)


def test_nan_weights_are_a_warning(tmp_path, capfd):
    config = tiny()
    tensors = write_folder(tmp_path / "good", "official", config)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    tensors["model.norm.weight"][0] = -np.nan
    tensors["model.vision_encoder.post_layernorm.bias"][0] = np.inf
    write_folder(tmp_path / "in", "official", config, tensors=tensors)
    assert convert("hf", tmp_path / "in", tmp_path / "out") == 0
    error = capfd.readouterr().err
    assert "NaN in 2 of its tensors: llm/layers/mlp/up/kernel[1], llm/norm/scale" in error
    assert convert("export", tmp_path / "out", tmp_path / "back", "--format", "official") == 0
    assert_same_tensors(read_tensors(tmp_path / "back"), tensors)


class Payload:
    def __reduce__(self):
        return os.system, ("touch /tmp/vl3-pickle-ran",)


def test_pickle_that_would_run_code_is_refused(tmp_path, capfd):
    torch = pytest.importorskip("torch")
    write_folder(tmp_path / "in", "official", tiny())
    (tmp_path / "in" / "model.safetensors").unlink()
    path = tmp_path / "in" / "pytorch_model.bin"
    torch.save({"model.norm.weight": Payload()}, path)
    assert_refused(tmp_path, capfd, str(path), "would run posix.system")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(Payload()))
    assert_refused(tmp_path, capfd, "would run posix.system")
    path.write_bytes(pickle.dumps(Payload()))
    assert_refused(tmp_path, capfd, "truncated, or in the format of torch before 1.6")
    assert not os.path.exists("/tmp/vl3-pickle-ran")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shards", [1, 2])
def test_valid_pickles_are_read(tmp_path, dtype, shards):
    torch = pytest.importorskip("torch")
    config = tiny(tied=True)
    tensors = write_folder(tmp_path / "in", "official-train", config, dtype)
    (tmp_path / "in" / "model.safetensors").unlink()
    torch_dtype = getattr(torch, dtype)
    state = {name: torch.tensor(tensor.astype(np.float32)).to(torch_dtype) for name, tensor in tensors.items()}
    # Tied weights share storage, and a transposed view is not contiguous.
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name].t().contiguous().t()
    if shards == 1:
        torch.save(state, tmp_path / "in" / "pytorch_model.bin")
    else:
        names, weight_map = list(state), {}
        for number in range(shards):
            file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
            torch.save({name: state[name] for name in names[number::shards]}, tmp_path / "in" / file)
            weight_map |= dict.fromkeys(names[number::shards], file)
        write_json(tmp_path / "in" / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    assert convert("hf", tmp_path / "in", tmp_path / "out") == 0
    assert convert("export", tmp_path / "out", tmp_path / "back", "--format", "native") == 0
    assert_same_tensors(read_tensors(tmp_path / "back"), renamed(tensors, "official-train", "native", config))


def test_free_space_is_checked_before_anything_is_written(tmp_path, capfd, monkeypatch):
    write_folder(tmp_path / "in", "official", tiny())
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    assert_refused(tmp_path, capfd, "no space left", "1.00 kB are free")
    monkeypatch.undo()
    assert convert("hf", tmp_path / "in", tmp_path / "out") == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    capfd.readouterr()
    assert convert("export", tmp_path / "out", tmp_path / "b", "--format", "native") == 2
    assert "no space left" in capfd.readouterr().err
    assert not (tmp_path / "b").exists()


def test_disk_that_fills_up_during_a_conversion(tmp_path, capfd, monkeypatch):
    write_folder(tmp_path / "in", "official", tiny())

    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("vl3_jax.checkpoint.orbax_write._write_slice", full)
        assert_refused(tmp_path, capfd, "no space left on the disk", "same command again")
    assert convert("hf", tmp_path / "in", tmp_path / "out") == 0
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        capfd.readouterr()
        assert convert("export", tmp_path / "out", tmp_path / "b", "--format", "native") == 2
        assert "no space left on the disk" in capfd.readouterr().err
    assert convert("export", tmp_path / "out", tmp_path / "b", "--format", "native") == 0


def test_target_with_other_data(tmp_path, capfd):
    write_folder(tmp_path / "in", "official", tiny())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    assert convert("hf", tmp_path / "in", tmp_path / "out") == 2
    assert "exists already" in capfd.readouterr().err
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_second_process_is_locked_out(tmp_path, capfd):
    from vl3_jax.checkpoint import open_hf
    from vl3_jax.storage.jobs import Job

    write_folder(tmp_path / "in", "official", tiny())
    fingerprint = open_hf(tmp_path / "in").fingerprint(to="orbax", dtype="None", layout=1)
    with Job(tmp_path / "out", fingerprint, []):
        assert convert("hf", tmp_path / "in", tmp_path / "out") == 2
        assert "is writing it; wait for that job or stop it" in capfd.readouterr().err
    assert convert("hf", tmp_path / "in", tmp_path / "out") == 0


def test_inspect_and_verify(tmp_path, capsys):
    config = tiny()
    tensors = write_folder(tmp_path / "a", "official", config, "float32")
    assert convert("hf", tmp_path / "a", tmp_path / "o") == 0
    assert convert("inspect", tmp_path / "o") == 0
    table = capsys.readouterr().out
    assert "llm/layers/mlp/gate/kernel" in table
    assert "2x64x128" in table
    assert "220,160" in table  # number of parameters
    assert convert("verify", tmp_path / "a", tmp_path / "o") == 0
    assert "equal" in capsys.readouterr().out
    tensors["model.layers.1.mlp.up_proj.weight"][7, 9] += 0.25
    write_folder(tmp_path / "b", "official", config, tensors=tensors)
    assert convert("verify", tmp_path / "o", tmp_path / "b") == 1
    text = capsys.readouterr().out
    assert "llm/layers/mlp/up/kernel[1]: 1 values, largest difference 0.25 at [9, 7]" in text
    assert "logits on the built-in prompt" in text
    assert text.rstrip().endswith("DIFFERENT")
    assert convert("verify", tmp_path / "o", tmp_path / "b", "--tolerance", "0.3", "--no-logits") == 0
    write_folder(tmp_path / "untied", "official", tiny(tied=False), "float32")
    assert convert("verify", tmp_path / "o", tmp_path / "untied") == 1
    assert "only in" in capsys.readouterr().out
