"""Fine-tuning on data of one's own: sizes, paths, runs that are too short, and data that were moved or changed."""

import json
import pathlib
import shutil

import pytest
from runs import reports

from vl3_jax import config_file
from vl3_jax.checkpoint.opening import NANO_FOLDER, open_tokenizer
from vl3_jax.cli.main import main
from vl3_jax.errors import InputError
from vl3_jax.processing.tokenizer import Tokenizer
from vl3_jax.training import run_config
from vl3_jax.training.optimizer import OptimizerConfig, schedule
from vl3_jax.training.setup import short_run_note

pytestmark = pytest.mark.usefixtures("fast_compile")
SMALL = ("data.length=128", "data.patches=64", "batch.rows=8", "dtype=float32", "remat.vision=none", "remat.text=none")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with training data and held-out data."""
    write(tmp_path / "train.json", ["moon", "spoon", "rain", "train", "sun", "run"])
    write(tmp_path / "held_out.json", ["sea", "tree"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: pathlib.Path, words: list[str]) -> None:
    turns = [[{"from": "human", "value": f"A word like {word}?"}, {"from": "gpt", "value": word}] for word in words]
    path.write_text(json.dumps([{"conversations": conversation} for conversation in turns]))


def finetune(*changes: str, train: str = "train.json") -> int:
    changes = (*SMALL, "log.tensorboard=False", f"data.datasets.train.annotations={train}", *changes)
    return main(["train", "--config", "finetune:video", "--workdir", "RUN", *(f"--config.{c}" for c in changes)])


@pytest.mark.slow
def test_a_short_run_of_any_size_on_ones_own_files(folder, capsys):
    held_out = ("eval.annotations=held_out.json", "eval.media=media")
    assert finetune("init_from=nano", "steps=1", "log.every=1", *held_out) == 0
    assert "so few steps (1, of them 0 warm-up) learns next to nothing" in capsys.readouterr().err
    first, last = reports(folder / "RUN")
    assert first["learning rate/llm"] > 0
    assert last["held-out loss"] > 0


@pytest.mark.slow
def test_a_run_goes_on_with_moved_data_and_not_with_changed_data(folder, capsys):
    run = ("init_from=nano", "steps=2", "checkpoint.every=1", "log.every=1")
    assert finetune(*run) == 0
    steps = folder / "RUN" / "checkpoints"
    shutil.rmtree(steps / "2")
    moved = folder / "elsewhere" / "renamed.json"
    moved.parent.mkdir()
    shutil.copy("train.json", moved)  # with another time
    losses = [line["loss"] for line in reports(folder / "RUN")]
    assert finetune(*run, "data.root=elsewhere", train="renamed.json") == 0
    assert [line["loss"] for line in reports(folder / "RUN")] == losses
    shutil.rmtree(steps / "2")
    moved.write_text(moved.read_text().replace("moon", "noon"))
    assert finetune(*run, "data.root=elsewhere", train="renamed.json") == 2
    assert "other data" in capsys.readouterr().err


def test_sizes_of_the_initial_weights(folder, capsys):
    assert finetune("init_from=nano", "model=2b", "steps=1") == 2
    assert "a '2b' model has" in capsys.readouterr().err
    assert finetune("init_from=", "random_init=True", "tokenizer=nano", "steps=1") == 2
    assert "give --config.model" in capsys.readouterr().err


@pytest.mark.parametrize("variant", ["video", "image", "lora"])
def test_mock_keeps_the_name_of_the_data_set(variant):
    config = config_file.load(f"finetune:{variant},mock", ["data.datasets.train.annotations=mine.json"])
    assert config.data.datasets.train.annotations == ("mine.json",)
    assert not config.init_from


@pytest.mark.parametrize(("steps", "warns"), [(1, True), (2, True), (3, False), (100, False)])
def test_a_run_that_is_mostly_warm_up_warns(steps, warns):
    assert bool(short_run_note(run_config.load("finetune:video"), steps)) == warns


def test_data_may_be_moved_but_not_exchanged():
    def check(*changes: str) -> None:
        run_config.check_same_run("RUN", recorded, run_config.load("finetune:video", changes))

    recorded = json.loads(json.dumps(config_file.load("finetune:video").to_dict()))
    check("data.root=/other", "data.datasets.train.annotations=b.json", "data.datasets.train.media=m")
    for change in ("data.datasets.train.weight=2", "data.datasets.train.outside=True", "data.length=64"):
        with pytest.raises(InputError, match=change.split("=")[0]):
            check(change)


@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_every_run_has_a_step_with_the_peak_rates(steps, ratio):
    warmup = OptimizerConfig({"llm": 1.0}, warmup_ratio=ratio).warmup_steps(steps)
    multipliers = [float(schedule(steps, warmup)(step)) for step in range(steps)]
    assert max(multipliers) == pytest.approx(1.0)


def test_a_tokenizer_is_whatever_names_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = len(Tokenizer.from_folder(NANO_FOLDER))
    for name in ("nano", NANO_FOLDER, NANO_FOLDER / "tokenizer.json"):
        with open_tokenizer(name) as path:
            assert len(Tokenizer.from_folder(path)) == words
    assert main(["convert", "hf", str(NANO_FOLDER), "ORBAX"]) == 0
    with open_tokenizer("ORBAX") as path:
        assert len(Tokenizer.from_folder(path)) == words
