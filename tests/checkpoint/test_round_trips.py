"""Bit-exact round trips of every layout through the command line."""

import json

import jax
import numpy as np
import pytest
from safetensors import safe_open

from support.hf_folders import (
    DTYPES,
    assert_same_tensors,
    read_tensors,
    renamed,
    tiny,
    write_folder,
    write_json,
)
from vl3_jax.checkpoint import load, open_source, write_hf, write_model_info, write_orbax
from vl3_jax.checkpoint.export import plan_shards
from vl3_jax.checkpoint.names import name_map
from vl3_jax.cli.main import main
from vl3_jax.model import preset


def convert(*arguments) -> int:
    return main(["convert", *map(str, arguments)])


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize(("tied", "shards"), [(True, 1), (False, 3)])
@pytest.mark.parametrize(
    ("layout", "targets"),
    [("official", ["official"]), ("native", ["native"]), ("official-train", ["official", "native"])],
)
def test_through_orbax_and_back(tmp_path, layout, targets, dtype, tied, shards):
    config = tiny(tied)
    tensors = write_folder(tmp_path / "in", layout, config, dtype, shards)
    assert convert("hf", tmp_path / "in", tmp_path / "orbax") == 0
    for target in targets:
        assert convert("export", tmp_path / "orbax", tmp_path / target, "--format", target) == 0
        assert_same_tensors(read_tensors(tmp_path / target), renamed(tensors, layout, target, config))
        with safe_open(tmp_path / target / "model.safetensors", "np") as file:
            assert file.metadata() == {"format": "pt"}
        if layout == target:
            for name in ("config.json", "tokenizer.json", "generation_config.json", "preprocessor_config.json"):
                assert (tmp_path / target / name).read_bytes() == (tmp_path / "in" / name).read_bytes()


def test_official_to_native_and_back(tmp_path):
    config = tiny(tied=False)
    tensors = write_folder(tmp_path / "a", "official", config)
    steps = ["a", "o1", "b", "o2", "a2"]
    formats = [None, "native", None, "official"]
    for source, target, layout in zip(steps, steps[1:], formats, strict=False):
        action = ["hf"] if layout is None else ["export"]
        options = [] if layout is None else ["--format", layout]
        assert convert(*action, tmp_path / source, tmp_path / target, *options) == 0
    assert_same_tensors(read_tensors(tmp_path / "a2"), tensors)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("a", "a2"))
    for key in set(before) - {"vision_encoder_config"}:
        assert after[key] == before[key], key
    assert after["vision_encoder_config"].items() >= before["vision_encoder_config"].items()
    for file in ("preprocessor_config.json", "processor_config.json"):
        before, after = (json.loads((tmp_path / name / file).read_text()) for name in ("a", "a2"))
        assert after.items() >= before.items()
    native = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (native["image_token_id"], native["video_token_id"]) == (500, 501)
    video = json.loads((tmp_path / "b" / "video_preprocessor_config.json").read_text())
    assert (video["min_pixels"], video["max_pixels"], video["merge_size"]) == (12_544, 12_000 * 784, 2)


def test_native_to_official_adds_special_tokens(tmp_path):
    write_folder(tmp_path / "b", "native", tiny())
    assert convert("hf", tmp_path / "b", tmp_path / "o") == 0
    assert convert("export", tmp_path / "o", tmp_path / "a", "--format", "official") == 0
    tokenizer = json.loads((tmp_path / "a" / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert [ids[name] for name in ("<image>", "<|stream_start|>", "<|stream_end|>")] == [502, 503, 504]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["image_token_index"] == 502
    assert config["vision_encoder_config"]["num_hidden_layers"] == 2
    assert config["eos_token_id"] == 492


def test_trainer_config_becomes_a_released_one(tmp_path):
    write_folder(tmp_path / "in", "official-train", tiny())
    assert convert("hf", tmp_path / "in", tmp_path / "o") == 0
    assert convert("export", tmp_path / "o", tmp_path / "a", "--format", "official") == 0
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["vision_encoder"] is None
    assert config["vision_encoder_config"]["hidden_size"] == 64
    assert config["image_token_index"] == 505
    assert "llm_lr" not in config


def test_redundant_head_is_dropped(tmp_path, capfd):
    config = tiny(tied=True)
    tensors = write_folder(tmp_path / "plain", "official", config)
    copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    write_folder(tmp_path / "both", "official", config, extra=copy)
    assert convert("hf", tmp_path / "both", tmp_path / "o") == 0
    assert "lm_head" not in capfd.readouterr().err
    assert convert("export", tmp_path / "o", tmp_path / "back", "--format", "official") == 0
    assert_same_tensors(read_tensors(tmp_path / "back"), tensors)
    other = {"lm_head.weight": tensors["model.embed_tokens.weight"][::-1].copy()}
    write_folder(tmp_path / "differs", "official", config, extra=other)
    assert convert("hf", tmp_path / "differs", tmp_path / "o2") == 0
    assert "it is dropped, as the released code drops it" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("stored", "target"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")]
)
def test_dtype_option_casts_and_logs_it(tmp_path, capfd, stored, target):
    config = tiny()
    tensors = write_folder(tmp_path / "a", "official", config, stored)
    assert convert("hf", tmp_path / "a", tmp_path / "o", "--dtype", target) == 0
    assert f"cast from {stored} to {target}" in capfd.readouterr().err
    assert convert("export", tmp_path / "o", tmp_path / "b", "--format", "official") == 0
    assert_same_tensors(read_tensors(tmp_path / "b"), {k: v.astype(DTYPES[target]) for k, v in tensors.items()})
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == target


def test_both_rope_spellings(tmp_path):
    config = tiny()
    write_folder(tmp_path / "old", "native", config)
    content = json.loads((tmp_path / "old" / "config.json").read_text())
    theta = content["text_config"].pop("rope_theta")
    content["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    write_folder(tmp_path / "new", "native", config)
    write_json(tmp_path / "new" / "config.json", content)
    assert open_source(tmp_path / "old").config == open_source(tmp_path / "new").config == config


def test_shards_of_the_released_sizes():
    for name, expected in (
        ("2b", ["model.safetensors"]),
        ("7b", [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]),
    ):
        names = name_map("native", preset(name))
        dtypes = dict.fromkeys(names.leaves, np.dtype(DTYPES["bfloat16"]))
        assert [shard.name for shard in plan_shards(list(names.tensors.values()), dtypes, 5 * 10**9)] == expected


def test_export_in_shards(tmp_path):
    config = tiny()
    tensors = write_folder(tmp_path / "a", "official", config)
    write_hf(open_source(tmp_path / "a"), tmp_path / "b", "official", quiet=True, shard_bytes=100_000)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert len(set(index["weight_map"].values())) > 3
    assert_same_tensors(read_tensors(tmp_path / "b"), tensors)
    assert convert("hf", tmp_path / "b", tmp_path / "o") == 0


def test_orbax_restores_the_folder(tmp_path):
    import orbax.checkpoint as ocp

    write_folder(tmp_path / "a", "official", tiny())
    write_orbax(open_source(tmp_path / "a"), tmp_path / "o", quiet=True)
    params = load(tmp_path / "a").params
    devices = np.array(jax.devices()[:4])
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(devices, "x"), jax.sharding.PartitionSpec())
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), params)
    with ocp.StandardCheckpointer() as checkpointer:
        plain, sharded = checkpointer.restore(tmp_path / "o"), checkpointer.restore(tmp_path / "o", abstract)
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "o")
    for restored in (plain, sharded, tree):
        jax.tree.map(np.testing.assert_array_equal, restored, params)
    assert jax.tree.leaves(sharded)[0].sharding == sharding


@pytest.mark.parametrize("layout", ["item", "state", "zarr3"])
def test_checkpoints_of_a_training_run_are_read(tmp_path, layout):
    import orbax.checkpoint as ocp

    config = tiny()
    tensors = write_folder(tmp_path / "a", "official", config, "float32")
    source = open_source(tmp_path / "a")
    params = load(tmp_path / "a").params
    params["vision"]["post_ln"]["bias"] = jax.numpy.zeros(64)
    tensors["model.vision_encoder.post_layernorm.bias"] = np.zeros(64, np.float32)
    state = {"step": np.int32(7), "params": params, "opt_state": {"mu": params}}
    workdir = tmp_path / "run"
    workdir.mkdir()
    write_model_info(workdir, source)
    if layout == "zarr3":
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)) as checkpointer:
            checkpointer.save(workdir / "checkpoints" / "10" / "params", params)
    else:
        with ocp.CheckpointManager(workdir / "checkpoints") as manager:
            for step in (2, 10):
                item = {"params": ocp.args.StandardSave(params)}
                if layout == "state":
                    item = {"state": ocp.args.StandardSave(state)}
                manager.save(step, args=ocp.args.Composite(**item))
    assert open_source(workdir).tree.parent.name == "10"
    assert convert("export", workdir, tmp_path / "b", "--format", "official") == 0
    assert_same_tensors(read_tensors(tmp_path / "b"), tensors)
