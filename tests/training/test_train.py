"""`vl3 train` as a user runs it: stages, stopping, resuming, errors, and other commands on a workdir."""

import json
import os
import re
import signal

import jax
import numpy as np
import pytest
from PIL import Image
from runs import command, params, reports, run

from data_pipelines import mixture_dataset
from support.tolerances import REORDERED
from support.tolerances import RESUMED_ON_ANOTHER_MESH as RESUMED
from vl3_jax import config_file
from vl3_jax.checkpoint import load
from vl3_jax.cli.main import main
from vl3_jax.training.groups import flatten
from vl3_jax.training.metrics import MetricWriter

# All runs have the same number of steps, which is part of the compiled step.
TINY = ("steps=4", "checkpoint.every=2", "log.every=2", "mesh.fsdp=8")
pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """The four stages on synthetic data, each initialised from the previous one's checkpoint."""
    folder = tmp_path_factory.mktemp("stages")
    before = ()
    for stage in (1, 2, 3, 4):
        workdir = folder / f"stage{stage}"
        assert run(f"stage{stage}:2b", workdir, *TINY, *before) == 0
        before = (f"init_from={workdir}",)
    return folder


@pytest.mark.slow
def test_each_stage_trains_its_modules(stages):
    after = {stage: params(stages / f"stage{stage}", 4) for stage in (1, 2, 3, 4)}
    first = params(stages / "stage1", 2)
    assert set(after[1]) == set(after[4]) == set(first)
    for path, value in first.items():
        changed = not np.array_equal(value, after[1][path])
        assert changed == (not path.startswith("llm/")), path
    for stage in (2, 3, 4):
        for path in after[stage]:
            assert not np.array_equal(after[stage][path], after[stage - 1][path]), (stage, path)


@pytest.mark.slow
def test_a_stage_logs_its_metrics(stages):
    for stage in (1, 2, 3, 4):
        lines = reports(stages / f"stage{stage}")
        assert [line["step"] for line in lines] == [2, 4]
        for line in lines:
            assert 5 < line["loss"] < 8
            assert 0 < line["packing efficiency"] <= 1
            assert line["tflops/device"] > 0
            assert line["tokens/s"] > line["vision tokens/s"] > 0
            assert 0 <= line["data wait"] <= 1
    pruned = [reports(stages / f"stage{stage}")[-1]["kept"] for stage in (1, 3)]
    assert pruned[0] == 1 > pruned[1]


@pytest.mark.slow
def test_packing_is_planned_once(stages, monkeypatch):
    def plan_packing(*_):
        raise AssertionError("planned again")

    monkeypatch.setattr(mixture_dataset, "plan_packing", plan_packing)
    assert run("stage1:2b", stages / "stage1", *TINY) == 0


@pytest.mark.slow
def test_a_workdir_is_a_model(stages, tmp_path, capsys):
    image = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8)).save(image)
    capsys.readouterr()
    model = ["--model", str(stages / "stage4"), "--image", str(image), "--max-new-tokens", "3", "--json"]
    assert main(["ask", *model, "What is this?"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["token_ids"]) <= 3
    assert answer["visual_tokens"] == 6  # images at merge size 2, as in training
    assert main(["convert", "export", str(stages / "stage4"), str(tmp_path / "out"), "--format", "native"]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert main(["convert", "verify", str(stages / "stage4"), str(tmp_path / "out")]) == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without interruption."""
    workdir = tmp_path_factory.mktemp("whole")
    assert run("stage3:2b", workdir / "run", *TINY, "log.every=1") == 0
    return workdir / "run"


def stop_after(step, monkeypatch, number=signal.SIGTERM):
    """Sends this process a signal while a step runs."""
    original = MetricWriter.step

    def observed(self, done):
        original(self, done)
        if done == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(MetricWriter, "step", observed)


def test_a_stopped_run_resumes_bit_exactly(whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert run("stage3:2b", tmp_path / "run", *TINY, "log.every=1") == 0
    assert "stopped after step 3 of 4" in capsys.readouterr().err
    assert reports(tmp_path / "run")[-1]["step"] == 3
    assert run("stage3:2b", tmp_path / "run", *TINY, "log.every=1") == 0
    for path, value in params(whole, 4).items():
        np.testing.assert_array_equal(params(tmp_path / "run", 4)[path], value, err_msg=path)
    losses = [[line["loss"] for line in reports(workdir) if line["step"] == 4] for workdir in (whole, tmp_path / "run")]
    assert losses[0] == losses[1]
    assert run("stage3:2b", tmp_path / "run", *TINY) == 0
    assert "all 4 steps are done" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_resumes_on_another_mesh(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        assert run("stage3:2b", tmp_path / "run", *TINY) == 0
    changes = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "loader.threads=3", "log.every=1")
    assert run("stage3:2b", tmp_path / "run", *TINY, *changes) == 0
    last = [line for line in reports(tmp_path / "run") if line["step"] > 2]
    expected = np.mean([line["loss"] for line in reports(whole) if line["step"] > 2])
    assert min(line["loss"] for line in last) <= expected <= max(line["loss"] for line in last)
    before, ours, theirs = params(whole, 2), params(tmp_path / "run", 4), params(whole, 4)
    for path in ("llm/embed/embedding", "projector/fc2/kernel", "vision/layers/mlp/fc2/kernel"):
        step = np.linalg.norm(theirs[path] - before[path])
        assert np.linalg.norm(ours[path] - theirs[path]) < RESUMED * step, path


def test_held_out_data_profile_and_curves(tmp_path):
    changes = ("eval.annotations=synthetic://dev/digit?count=40", "eval.every=2", "profile.start=1", "profile.steps=1")
    arguments = command("stage3:2b", tmp_path / "run", *TINY, *changes)
    assert main(arguments) == 0
    held_out = [line for line in reports(tmp_path / "run") if "held-out loss" in line]
    assert [line["step"] for line in held_out] == [2, 4]
    assert held_out[0]["held-out loss"] != held_out[1]["held-out loss"]
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow
def test_adapters(whole, tmp_path, monkeypatch, capsys):
    start = ("random_init=False", f"init_from={whole}")
    lora = (*TINY, *start, "lora.rank=4")
    assert run("finetune:lora", tmp_path / "whole", *lora) == 0
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        assert run("finetune:lora", tmp_path / "run", *lora) == 0
    assert run("finetune:lora", tmp_path / "run", *lora) == 0
    base, merged, again = params(whole, 4), params(tmp_path / "whole", 4), params(tmp_path / "run", 4)
    for path, value in base.items():
        changed = not np.array_equal(value, merged[path])
        adapted = path.startswith("llm/layers/") and path.endswith("kernel")
        assert changed == (adapted or path.startswith("projector/")), path
        np.testing.assert_array_equal(merged[path], again[path], err_msg=path)
    assert main(["convert", "export", str(whole), str(tmp_path / "hf"), "--format", "official"]) == 0
    export = ["convert", "export", str(tmp_path / "whole"), str(tmp_path / "peft"), "--format", "peft"]
    assert main(export) == 2  # PEFT cannot load the workdir that the run began from
    assert "began from no Hugging Face model" in capsys.readouterr().err
    assert main([*export, "--base", str(tmp_path / "hf")]) == 0
    for path, value in flatten(load(tmp_path / "peft").params).items():
        np.testing.assert_allclose(value, merged[path], rtol=REORDERED, atol=REORDERED, err_msg=path)
    for folder, message in ((whole, "a run without adapters"), (tmp_path / "hf", "something else")):
        assert main(["convert", "export", str(folder), str(tmp_path / "none"), "--format", "peft"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    changes = ("steps=8", "optimizer.learning_rates.llm=1000", "optimizer.weight_decay=1000", "optimizer.clip=0.0")
    assert run("stage3:2b", tmp_path / "run", *TINY, *changes) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"vl3 train: step \d: loss .*; its samples are synthetic #", error)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ("stage3:2b", ["optimizer.rate=1"], "optimizer.rate: no such setting: 'rate' is unknown"),
        ("stage3:2b", ["random_init=False"], "no initial weights: give --config.init_from=CHECKPOINT"),
        ("stage3:2b", ["init_from=/nowhere"], "/nowhere"),
        ("stage3:2b", ["mesh.tensor=3"], "does not cover 8 devices"),
        ("stage3:2b", ["batch.rows=12"], "12 rows of a step do not divide into 8 parts (mesh data 1 x fsdp 8"),
        ("stage3:2b", ["batch.rows=8", "batch.grad_accum_steps=3"], "do not divide into 24 parts"),
        ("stage3:2b", ["optimizer.groups=[('vision/.*', 'vision')]"], "is in no group"),
        ("stage3:2b", ["seed=many"], "seed=many: give a value like 42"),
    ],
)
def test_bad_input_is_one_line(config, changes, message, tmp_path, capsys):
    assert run(config, tmp_path / "run", *changes) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert error[-1].startswith("vl3 train: ")
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_something_else(whole, tmp_path, capsys):
    assert run("stage3:2b", whole, *TINY, "seed=1") == 2
    assert "belongs to a run with seed = 42, now it is 1" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("mine")
    assert run("stage3:2b", tmp_path, *TINY) == 2
    assert "holds something that is no training run" in capsys.readouterr().err


PAPER = {1: (1e-5, 1e-3, 0.0), 2: (2e-6, 1e-5, 1e-5), 3: (2e-6, 1e-5, 1e-5), 4: (2e-6, 1e-5, 1e-5)}


@pytest.mark.parametrize("size", ["2b", "7b"])
@pytest.mark.parametrize("stage", PAPER)
def test_the_papers_numbers(stage, size):
    config = config_file.load(f"stage{stage}:{size}")
    assert tuple(config.optimizer.learning_rates[name] for name in ("vision", "projector", "llm")) == PAPER[stage]
    data = config.data
    assert (data.length, data.max_tokens, data.fps, data.max_frames) == (16_384, 10_240, 1, 180)
    assert (data.image_merge, data.video_merge) == (2 if stage == 4 else 1, 2)
    assert data.prune_threshold == (0.1 if stage > 2 else 0)
    assert (config.optimizer.warmup_ratio, config.optimizer.clip, config.batch.samples) == (0.03, 1.0, 128)
    assert config.model == size
    assert config.epochs == 1


def test_other_configurations_load():
    for variant in ("video", "image", "lora"):
        config = config_file.load(f"finetune:{variant}")
        assert config.init_from.startswith("DAMO-NLP-SG/")
        assert jax.tree.leaves(config.to_dict())


@pytest.mark.slow
def test_benchmarks_beside_the_loss(tmp_path):
    """Scores of a named set of benchmarks stand in the log and in the event files, every so many steps."""
    changes = ("eval.tasks=nano/digit", "eval.questions=2", "eval.every=2")
    assert main(command("stage3:2b", tmp_path / "run", *TINY, *changes)) == 0
    scores = [line for line in reports(tmp_path / "run") if "eval/nano/digit" in line]
    assert not any("without an answer" in key for line in scores for key in line)
    assert [line["step"] for line in scores] == [2, 4]
    assert all(0 <= line["eval/nano/digit"] <= 100 for line in scores)
    (events,) = (tmp_path / "run" / "tensorboard").glob("events*")
    assert b"eval/nano/digit" in events.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"), [("eval.tasks=tennis", "tennis"), ("eval.tasks=videomme", "videomme needs its data")]
)
def test_unknown_benchmarks_end_a_run_before_it_begins(tmp_path, capsys, change, message):
    assert run("stage3:2b", tmp_path / "run", *TINY, change) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
