"""Checkpoints under gs://, tested against an in-process server."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from support.hf_folders import read_tensors, tiny, write_folder
from vl3_jax.checkpoint import find_tree, load, name_map, open_source, orbax_write, write_model_info
from vl3_jax.cli.main import main
from vl3_jax.cli.streams import EXIT_INTERRUPTED


def convert(*arguments) -> int:
    return main(["convert", *map(str, arguments)])


def last_error_line(capfd) -> str:
    """Returns the last line of stderr, which follows the output of the clients."""
    return capfd.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gcs") / "hf"
    write_folder(folder, "official", tiny(), shards=2)
    return folder


@pytest.fixture(scope="module")
def bucket(gcs, local):
    """Creates a bucket with a converted model, and buckets that refuse requests."""
    gcs.buckets |= {"models": {}, "forbidden": {}, "anonymous": {}, "readonly": {}}
    gcs.refused |= {"forbidden": 403, "anonymous": 401}
    gcs.read_only.add("readonly")
    assert convert("hf", local, "gs://models/model") == 0
    return gcs.buckets["models"]


def test_converted_model_is_read_in_place(bucket, gcs, local, tmp_path, capfd):
    tensors = read_tensors(local)
    source = open_source("gs://models/model")
    for name, spec in name_map("official", tiny()).tensors.items():
        np.testing.assert_array_equal(source.slice(spec.leaf, spec.layer).read().result(), spec.to_leaf(tensors[name]))
    remote_checkpoint, local_checkpoint = load("gs://models/model"), load(local)
    jax.tree.map(np.testing.assert_array_equal, remote_checkpoint.params, local_checkpoint.params)
    assert (remote_checkpoint.files / "tokenizer.json").read_bytes() == (local / "tokenizer.json").read_bytes()
    assert convert("verify", "gs://models/model", local, "--no-logits") == 0
    assert convert("export", "gs://models/model", tmp_path / "out", "--format", "official") == 0
    assert (tmp_path / "out" / "config.json").read_bytes() == (local / "config.json").read_bytes()
    capfd.readouterr()
    gcs.log.clear()
    assert convert("inspect", "gs://models/model/") == 0
    assert "llm/layers/mlp/up/kernel" in capfd.readouterr().out
    assert len(gcs.log) < 20 + len(source.leaves)  # one request for each array, and a few to find them


def test_orbax_restores_the_model(bucket):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore("gs://models/model")
    jax.tree.map(np.testing.assert_array_equal, params, load("gs://models/model").params)


def test_interrupted_conversion_is_resumed(bucket, gcs, local, monkeypatch, capfd):
    done = []

    def fail(source, path, layer, *rest):
        if len(done) > 20:
            raise KeyboardInterrupt
        done.append((path, layer))
        return original(source, path, layer, *rest)

    original = orbax_write._write_slice
    with monkeypatch.context() as patch:
        patch.setattr(orbax_write, "_write_slice", fail)
        assert convert("hf", local, "gs://models/again") == EXIT_INTERRUPTED
    assert find_tree("gs://models/again") is None
    written = {name for name in gcs.names("models", "again/") if name.rsplit("/", 1)[-1][0].isdigit()}
    assert len(written) >= 20
    deleted = min(written)
    del bucket[deleted]
    before = dict(bucket)
    assert convert("hf", local, "gs://models/again") == 0
    assert all(bucket[name] is before[name] for name in written - {deleted})
    names = [name.removeprefix("again/") for name in gcs.names("models", "again/")]
    assert names == [name.removeprefix("model/") for name in gcs.names("models", "model/")]
    assert all(bucket[f"again/{name}"].data == bucket[f"model/{name}"].data for name in names if name[-1] == "0")
    capfd.readouterr()
    assert convert("hf", local, "gs://models/again") == 0
    assert "is complete already" in capfd.readouterr().err
    assert convert("hf", local, "gs://models/again", "--dtype", "float32") == 2
    assert "exists already" in last_error_line(capfd)


def test_another_job_starts_over(bucket, gcs, local, capfd):
    gcs.put("models", "other/.vl3_started.json", b'{"fingerprint": "another"}')
    gcs.put("models", "other/llm.norm.scale/0", b"old")
    assert convert("hf", local, "gs://models/other") == 0
    assert "starting over" in capfd.readouterr().err
    assert convert("verify", "gs://models/other", local, "--no-logits") == 0
    gcs.put("models", "mine/notes.txt", b"mine")
    assert convert("hf", local, "gs://models/mine") == 2
    assert "exists already" in last_error_line(capfd)


def test_newest_complete_step_of_a_workdir(bucket, gcs, local):
    import orbax.checkpoint as ocp

    params = load(local).params
    write_model_info("gs://models/run", open_source(local))
    with ocp.CheckpointManager("gs://models/run/checkpoints") as manager:
        for step in (2, 10):
            manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
    assert open_source("gs://models/run").tree.parent.name == "10"
    assert open_source("gs://models/run/checkpoints/2").tree.parent.name == "2"
    jax.tree.map(np.testing.assert_array_equal, load("gs://models/run").params, params)
    del bucket["run/checkpoints/10/commit_success.txt"]  # the step is now incomplete
    assert open_source("gs://models/run").tree.parent.name == "2"


def test_hugging_face_folder_is_read_in_place(bucket, gcs, local):
    for file in local.iterdir():
        gcs.put("models", f"hf/{file.name}", file.read_bytes())
    jax.tree.map(np.testing.assert_array_equal, load("gs://models/hf").params, load(local).params)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gs://nobody/model", "no such folder; check the address"),
        ("gs://models/nothing", "no such folder; check the address"),
        ("gs://forbidden/model", "permission denied; reading needs the role Storage Object Viewer"),
        ("gs://anonymous/model", "no valid credentials; log in with"),
        ("gs://models/broken", "llm/norm/scale cannot be read"),
        ("gs://models/bare", "an Orbax folder without vl3.json"),
    ],
)
def test_unreadable_sources_are_reported_in_one_line(bucket, gcs, source, message, tmp_path, capfd):
    if source.endswith("broken"):
        bucket |= {name.replace("model/", "broken/", 1): bucket[name] for name in gcs.names("models", "model/")}
        del bucket["broken/llm.norm.scale/0"]
    bucket["bare/_METADATA"] = bucket["model/_METADATA"]
    assert main(["ask", "--model", source, "What?"]) == 2
    assert message in last_error_line(capfd)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("gs://nobody/model", "no such bucket or folder"),
        ("gs://forbidden/model", "permission denied"),
        ("gs://readonly/model", "permission denied"),
        ("s3://models/model", "is a local folder or gs://bucket/folder"),
    ],
)
def test_targets_that_cannot_be_written(bucket, local, target, message, capfd):
    assert convert("hf", local, target) == 2
    assert message in last_error_line(capfd)


def test_exports_must_be_local(bucket, capfd):
    assert convert("export", "gs://models/model", "gs://models/out", "--format", "native") == 2
    assert "exports go to local folders" in last_error_line(capfd)


def test_missing_gcs_clients():
    words = ["convert", "inspect", "gs://models/model"]
    code = f"import sys; sys.modules['gcsfs'] = None; from vl3_jax.cli.main import main; sys.exit(main({words}))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 2
    assert "pip install vl3_jax[gcs]" in process.stderr
    assert len(process.stderr.splitlines()) == 1
