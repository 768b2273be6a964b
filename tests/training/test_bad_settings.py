"""A table of values for every setting of `vl3 train`: each reaches the first state of the run, or one line says no."""

import dataclasses
import shutil

import pytest
from runs import command

from data_pipelines.mixture_dataset import DatasetSpec
from vl3_jax import config_tree
from vl3_jax.cli.main import main
from vl3_jax.training.run_config import RunConfig
from vl3_jax.training.setup import TrainSetup

LONG = "9" * 400
DATA = "data.datasets.synthetic."
SAMPLES = f"{DATA}annotations=synthetic://train/stage3?count=16"
WRONG_NUMBERS = ("nan", "inf", "1e999", LONG, "many", "", "[1]", "{}", "True", "None", "-1e400", "1j", "0x", "()")
# Values that are refused, by setting.
REFUSED = {
    "model": ("tiny2", "2B", ""),
    "init_from": ("/nowhere", "s3://bucket/run", "no/such/model/at/all"),
    "random_init": ("1", "yes", "", "None"),
    "tokenizer": ("/nowhere/tokenizer.json",),
    "seed": ("-1", "4294967296", "1.5", *WRONG_NUMBERS),
    "dtype": ("float64", "int8", "bf16", "", "Float32"),
    "param_dtype": ("int32", "float8"),
    "frozen_dtype": ("int8", "half"),
    "remat.vision": ("everything", ""),
    "remat.text": ("None",),
    "mesh": ("8", "data=8"),
    "mesh.data": ("0", "-2", "3", "-1", "2147483648", "1.0"),
    "mesh.fsdp": ("0", "16", "True"),
    "mesh.tensor": ("-1", "7"),
    "mesh.context": ("2147483647", LONG),
    "cpu_devices": ("-1", "100000", "2.0"),
    "expect_devices": ("-1", "7", "1e3"),
    "batch.samples": ("0", "-1", "2147483648", "12.5"),
    "batch.rows": ("-8", "7", "2147483640", "8.0", LONG),
    "batch.grad_accum_steps": ("-1", "3", "2147483647"),
    "epochs": ("0", "-1", "0.5", "2147483648"),
    "steps": ("-1", "2147483648", "1e3", *WRONG_NUMBERS),
    "lora.rank": ("-1", "65537"),
    "lora.alpha": ("0", "-1", "nan"),
    "lora.patterns": ("(", "['(']", "[1]", "*"),
    "loader.workers": ("-1", "100000", "two"),
    "loader.threads": ("-1", "100000"),
    "loader.bad_share": ("-0.1", "1.1", "nan"),
    "eval.annotations": ("/nowhere.jsonl", "['']", "[1]"),
    "eval.media": ("/nowhere",),
    "eval.tasks": ("tennis", "nano/digit,tennis", "videomme"),
    "eval.data": ("/nowhere",),
    "eval.questions": ("5", "-1"),
    "eval.every": ("5", "-1"),
    "eval.steps": ("5", "-1"),
    "eval.outside": ("1",),
    "eval.remote": ("None",),
    "checkpoint.every": ("-1", "0.5", "1e9"),
    "checkpoint.keep": ("-1", "2147483648", "all"),
    "checkpoint.digests": ("1", "both"),
    "log.every": ("0", "-5", "nan"),
    "log.tensorboard": ("2", ""),
    "profile.start": ("-1", "2147483648"),
    "profile.steps": ("-1", "100", "15"),
    "mock": ("0",),
    "optimizer.learning_rates.llm": ("-1", "1e9", "nan", "1e999", LONG, "[1]", "True"),
    "optimizer.learning_rates.none": ("1",),
    "optimizer.groups": ("[('(', 'llm')]", "[('.*',)]", "all", "[('nothing', 'llm')]", "[]", "[1]"),
    "optimizer.kind": ("sgd", ""),
    "optimizer.warmup_ratio": ("-0.1", "1.1", "nan", "20"),
    "optimizer.b1": ("1", "-0.1"),
    "optimizer.b2": ("1.0", "inf"),
    "optimizer.eps": ("0", "-1e-8"),
    "optimizer.weight_decay": ("-1", "nan"),
    "optimizer.muon_beta": ("1", "-1"),
    "optimizer.clip": ("-1", "inf"),
    "optimizer.scale_with_batch": ("cube", "True"),
    "optimizer.first_moment_dtype": ("float16", ""),
    "data": ("stage4",),
    "data.image_merge": ("0", "3", "1.0"),
    "data.video_merge": ("4", "-2"),
    "data.min_tokens": ("0", "-1", "100000"),
    "data.max_tokens": ("0", "1", "2147483648"),
    "data.fps": ("0", "-1", "-0.0", "1e-7", "1001", *WRONG_NUMBERS),
    "data.max_frames": ("0", "-1", "2147483648"),
    "data.image_mean": ("0.5", "(0.5, 0.5)", "(0.5, 0.5, 'a')", "(0.5, 0.5, 1e999)"),
    "data.image_std": ("(0, 0, 0)", "(0.5, 0.5, -1)"),
    "data.preprocess": ("mine", ""),
    "data.prune_threshold": ("-0.1", "nan", "1001", "False"),
    "data.visual_budget": ("-1", "nan", "1.5", "True", "3000000000"),
    "data.prune_min_tokens": ("-1", "1.5"),
    "data.native_placeholders": ("1",),
    "data.threads": ("-1", "1025"),
    "data.seed": ("-1", "4294967296"),
    "data.length": ("0", "-1", "1048577", "8"),
    "data.shorter_lengths": ("64", "(0,)", "(64, 'a')", "(-1,)"),
    "data.patches": ("0", "-1", "4194305"),
    "data.vision_rows": ("0", "1025"),
    "data.vision_tokens": ("-1", "513"),
    "data.samples": ("0", "65537"),
    "data.max_frame_patches": ("0", "-1"),
    "data.trainer_streams": ("1",),
    "data.datasets": ("[]", "a.jsonl"),
    "data.datasets.other.weight": ("1",),
    f"{DATA}annotations": (
        "",
        "[]",
        "[1]",
        "/nowhere.jsonl",
        "synthetic://train/nothing",
        "synthetic://train/ocr?count=-1",
    ),
    f"{DATA}weight": ("-1", "0", "1001", "nan"),
    f"{DATA}size": ("-1",),
    f"{DATA}kind": ("csv",),
    f"{DATA}outside": ("1",),
    f"{DATA}remote": ("yes",),
}
# Values at the ends of what is allowed.
TAKEN = {
    "seed": ("0", "4294967295"),
    "steps": ("1", "1000000", "2147483647"),
    "epochs": ("2147483647",),
    "checkpoint.keep": ("0", "1000"),
    "checkpoint.every": ("0",),
    "log.every": ("1000000",),
    "optimizer.learning_rates.vision": ("0", "-0.0", "None"),
    "optimizer.clip": ("0",),
    "optimizer.warmup_ratio": ("0", "1"),
    "data.fps": ("0.000001", "1000"),
    "data.root": ("", "/nowhere"),
    "data.prune_threshold": ("0", "-0.0"),
    "data.visual_budget": ("0", "0.5", "1", "4096"),
    "data.shorter_lengths": ("(64, 64, 600)", "()"),
    "profile.steps": ("10",),
    f"{DATA}media": ("/nowhere",),
    f"{DATA}task": ("",),
    f"{DATA}size": ("1000000000000",),
}


class Reached(Exception):
    """The run would begin to load and to compile."""


def reached(setup, load_params):
    raise Reached


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Folder of the index of the data, which most runs share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(tmp_path, cache, monkeypatch, capsys):
    """Runs `vl3 train` with one change up to its first state; returns the exit code, or None there, and stderr."""
    monkeypatch.setattr(TrainSetup, "first_state", reached)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))

    def change(key, value):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        arguments = command("stage3:2b", tmp_path / "run", "log.tensorboard=False", SAMPLES, f"{key}={value}")
        try:
            return main(arguments), capsys.readouterr().err
        except Reached:
            return None, ""

    return change


@pytest.mark.parametrize("key", REFUSED)
def test_refused_in_one_line(key, run):
    for value in REFUSED[key]:
        code, said = run(key, value)
        assert code == 2, f"{key}={value} is taken"
        (line,) = (line for line in said.splitlines() if line and "%|" not in line)  # a progress bar
        assert line.startswith("vl3 train: ")
        assert len(line) < 1000


@pytest.mark.parametrize("key", TAKEN)
def test_taken(key, run):
    for value in TAKEN[key]:
        assert run(key, value) == (None, ""), f"{key}={value}"


def test_the_table_has_every_setting():
    def names(cls, prefix=""):
        for name, kind in config_tree.types(cls).items():
            yield from names(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [f"{prefix}{name}"]

    expected = {*names(RunConfig), *(DATA + name for name in config_tree.types(DatasetSpec))}
    tried = {*REFUSED, *TAKEN, "optimizer.learning_rates", "data.amounts", f"{DATA}index", f"{DATA}name"}
    assert not expected - tried
    assert sum(map(len, REFUSED.values())) > 175
