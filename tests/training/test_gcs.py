"""`vl3 train` with its workdir under gs://, against a server in this process."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from runs import reports, run, start

from vl3_jax.checkpoint import find_tree, load
from vl3_jax.cli.main import main

TINY = ("steps=4", "checkpoint.every=2", "log.every=2", "mesh.fsdp=8")
pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def bucket(gcs):
    gcs.buckets |= {"runs": {}, "shut": {}, "seen": {}}
    gcs.refused["shut"] = 403
    gcs.read_only.add("seen")
    return gcs.buckets["runs"]


@pytest.fixture(scope="module")
def resumed(bucket, gcs):
    """A run that was killed while it wrote its second checkpoint, and then resumed to its end."""
    gcs.stalled = "checkpoints/4/commit_success.txt"
    process = start("stage3:2b", "gs://runs/run", *TINY, "log.tensorboard=True", devices=8)
    try:
        assert gcs.stalling.wait(300)
    finally:
        process.kill()
        process.wait()
        gcs.stalled = None
    assert "run/checkpoints/4/params/_METADATA" in bucket
    assert find_tree("gs://runs/run").parent.name == "2"
    assert run("stage3:2b", "gs://runs/run", *TINY, "log.tensorboard=True") == 0
    return "gs://runs/run"


@pytest.mark.slow
def test_a_killed_run_resumes_bit_exactly(resumed, bucket, gcs, tmp_path):
    assert run("stage3:2b", tmp_path / "whole", *TINY) == 0
    assert find_tree(resumed).parent.name == "4"
    jax.tree.map(np.testing.assert_array_equal, load(resumed).params, load(tmp_path / "whole").params)
    lines = [json.loads(line) for line in bucket["run/metrics.jsonl"].data.splitlines()]
    whole = reports(tmp_path / "whole")
    assert [(line["step"], line["loss"]) for line in lines] == [(line["step"], line["loss"]) for line in whole]
    curves = [bucket[name].data for name in gcs.names("runs", "run/tensorboard/events")]
    assert len(curves) == 2
    assert all(b"loss" in curve for curve in curves)


@pytest.mark.slow
def test_other_commands_read_the_run(resumed, bucket, gcs, tmp_path, capsys):
    Image.fromarray(np.zeros((56, 84, 3), np.uint8)).save(tmp_path / "p.png")
    capsys.readouterr()
    words = ["--image", str(tmp_path / "p.png"), "--max-new-tokens", "3", "--json", "What is this?"]
    assert main(["ask", "--model", resumed, *words]) == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) <= 3
    assert run("stage3:2b", "gs://runs/next", *TINY, f"init_from={resumed}", "checkpoint.keep=1") == 0
    first, then = (json.loads(bucket[f"{name}/metrics.jsonl"].data.splitlines()[0])["loss"] for name in ("run", "next"))
    assert first != then  # the same data, and random weights would be the same
    assert {name.split("/")[2] for name in gcs.names("runs", "next/checkpoints/")} == {"4"}


@pytest.mark.parametrize(
    ("workdir", "changes", "message"),
    [
        pytest.param(
            "gs://runs/run", ["seed=1"], "belongs to a run with seed = 42, now it is 1", marks=pytest.mark.slow
        ),
        ("gs://nobody/run", [], "no such bucket or folder; check the address"),
        ("gs://shut/run", [], "permission denied; reading needs the role"),
        ("gs://seen/run", [], "permission denied; reading needs the role"),
        ("gs://runs/new", ["random_init=False", "init_from=gs://shut/run"], "gs://shut/run: permission denied"),
        ("gs://runs/new", ["random_init=False", "init_from=gs://runs/other"], "gs://runs/other: no such folder"),
        ("s3://runs/run", [], "is a local folder or gs://bucket/folder"),
    ],
)
def test_bad_input_is_one_line(bucket, request, workdir, changes, message, capsys):
    if workdir == "gs://runs/run":
        request.getfixturevalue("resumed")
    capsys.readouterr()
    assert run("stage3:2b", workdir, *TINY, *changes) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("vl3 train: ")
    assert message in error[-1]
