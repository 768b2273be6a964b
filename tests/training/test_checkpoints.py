"""What a run with adapters keeps, and what it compares when it is resumed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from tiny import MODEL, optimizer_for, start_params

from support.hf_folders import write_folder
from vl3_jax.checkpoint import load, open_source, write_orbax
from vl3_jax.checkpoint.orbax_tree import model_info
from vl3_jax.checkpoint.sources import Origin
from vl3_jax.cli.main import main
from vl3_jax.errors import InputError
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.training import run_config
from vl3_jax.training.checkpoints import Checkpoints
from vl3_jax.training.checksums import checksums
from vl3_jax.training.groups import WITH_LORA, flatten, map_paths
from vl3_jax.training.init import InitialWeights, prepare_workdir, recorded_rows
from vl3_jax.training.lora import add_adapters
from vl3_jax.training.run_config import CheckpointConfig
from vl3_jax.training.state import TrainState, new_state, state_shardings

RATES = {"vision": None, "projector": 1e-3, "llm": None, "lora": 5e-3}


def save_run(workdir, params: dict, devices: int = 1) -> tuple[Checkpoints, TrainState]:
    """Saves the state of a LoRA run before its first step."""
    params = add_adapters(params, jax.random.key(0), rank=4, alpha=8.0)
    optimizer = optimizer_for(params, groups=WITH_LORA, learning_rates=RATES)
    state, mesh = jax.jit(lambda: new_state(optimizer, params))(), make_mesh({"fsdp": devices}, jax.devices()[:devices])
    state = jax.device_put(state, state_shardings(state, MODEL.config, mesh))
    checkpoints = Checkpoints(epath.Path(workdir), optimizer, CheckpointConfig(), has_adapters=True)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    return checkpoints, state


def test_checksums_show_each_change():
    array = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 6)), jnp.bfloat16)
    sharded = jax.device_put(array, jax.NamedSharding(make_mesh({"fsdp": 8}), jax.P(None, "fsdp")))
    exchanged = array.at[0].set(array[1]).at[1].set(array[0])
    same, other, swapped, int8 = jax.jit(checksums)(
        [sharded, array.at[1, 2, 3].add(1), exchanged, array.astype("int8")]
    )
    assert checksums([array])[0] == same
    assert len({int(value) for value in (same, other, swapped, int8)}) == 4


def test_a_run_with_adapters_goes_on_from_its_own_start_only(tmp_path):
    checkpoints, state = save_run(tmp_path, start_params())
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    restored = checkpoints.restore(shapes, state).state
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    frozen = "llm/layers/mlp/up/kernel/base"
    changed = map_paths(lambda path, leaf: leaf.at[0, 0, 0].add(1e-3) if path == frozen else leaf, state.params)
    again = Checkpoints(epath.Path(tmp_path), checkpoints._optimizer, CheckpointConfig(), has_adapters=True)
    with pytest.raises(InputError, match=f"other weights now than its run began from .{frozen} and 0 more"):
        again.restore(shapes, dataclasses.replace(state, params=changed))
    again.close()
    checkpoints.close()


def test_a_start_of_another_configuration_is_refused(tmp_path):
    config, workdir = run_config.load("finetune:lora,mock"), epath.Path(tmp_path) / "run"
    text = dataclasses.replace(MODEL.config.text, rope_theta=10_000.0)
    for model_config in (MODEL.config, MODEL.config):
        prepare_workdir(workdir, config, InitialWeights(model_config, {}, None), rows=8)
    other = InitialWeights(dataclasses.replace(MODEL.config, text=text), {}, None)
    with pytest.raises(InputError, match="another configuration now than its run began from"):
        prepare_workdir(workdir, config, other, rows=8)


@pytest.mark.parametrize("name", ["config.json", "vl3.json", "assets/a.json"])
@pytest.mark.parametrize("content", [None, b"", b'{"config": {', b"[1]", b"\xff\xfe"])
def test_small_files_of_a_run_are_made_anew(name, content, tmp_path, caplog):
    config, workdir = run_config.load("finetune:lora,mock"), epath.Path(tmp_path) / "run"
    init = InitialWeights(MODEL.config, {"a.json": b"{}"}, None)
    prepare_workdir(workdir, config, init, rows=8)
    (workdir / "checkpoints").mkdir()
    before = (workdir / name).read_bytes()
    (workdir / name).unlink() if content is None else (workdir / name).write_bytes(content)
    if name == "vl3.json" or not recorded_rows(workdir, config):
        assert name != "config.json" or f"{workdir}/config.json is missing or damaged" in caplog.text
    prepare_workdir(workdir, config, init, rows=8)
    assert (workdir / name).read_bytes() == before
    assert recorded_rows(workdir, config) == 8


def write_run(workdir, base) -> None:
    """Writes what a LoRA run that began from a checkpoint leaves in its workdir."""
    source = open_source(base)
    checkpoints, _ = save_run(workdir, load(source).params)
    checkpoints.close()
    origin = source.origin and dataclasses.asdict(source.origin)
    record = {"config": {"lora": {"rank": 4, "alpha": 8.0}}, "rows": 8, "origin": origin}
    (workdir / "config.json").write_text(json.dumps(record))
    (workdir / "vl3.json").write_text(model_info(source.config, source.parts, source.files_kind))
    (workdir / "assets").mkdir()
    for file in source.files.glob("*.json"):
        (workdir / "assets" / file.name).write_bytes(file.read_bytes())
    place = "config.json" if source.files_kind == "official" else "video_preprocessor_config.json"
    for name, key, value in (
        ("preprocessor_config.json", "image_mean", [0.1] * 3),
        (place, "use_token_compression", False),
    ):
        path = workdir / "assets" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


@pytest.mark.parametrize("layout", ["native", "official"])
def test_an_export_names_its_base_and_is_read_back(tmp_path, layout, capsys):
    """The start is a conversion of a Hugging Face folder; the export is named after that."""
    write_folder(tmp_path / "hf", layout, MODEL.config, "float32")
    write_orbax(open_source(tmp_path / "hf"), tmp_path / "start")
    assert open_source(tmp_path / "start").origin == Origin(str(tmp_path / "hf"), layout)
    write_run(tmp_path / "run", tmp_path / "start")
    export = ["convert", "export", str(tmp_path / "run"), str(tmp_path / "peft"), "--format", "peft"]
    assert main([*export, "--dtype", "bfloat16"]) == 0
    content = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(tmp_path / "hf")
    assert ("language_model" in content["target_modules"]) == (layout == "native")
    assert not (tmp_path / "peft" / "config.json").exists()
    read = open_source(tmp_path / "peft")
    assert read.files_kind == layout
    settings = ProcessorConfig.from_folder(read.files)
    assert settings == ProcessorConfig.from_folder(tmp_path / "run" / "assets")
    assert (settings.image_mean[0], settings.prune_threshold) == (0.1, None)
    for path, leaf in flatten(load(tmp_path / "start").params).items():
        np.testing.assert_allclose(flatten(load(read).params)[path], leaf, rtol=1e-2, err_msg=path)
    assert main(export) == 2
    assert "exists already" in capsys.readouterr().err
    for folder in ("hf", "start", "peft"):
        assert main(["convert", "export", str(tmp_path / folder), str(tmp_path / "no"), "--format", "peft"]) == 2
        assert "not the workdir of a training run" in capsys.readouterr().err
    assert (
        main(["convert", "export", str(tmp_path / "hf"), str(tmp_path / "no"), "--format", "native", "--base", "x"])
        == 2
    )
    assert "belong to --format peft" in capsys.readouterr().err
