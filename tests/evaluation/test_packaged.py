"""What is promised of the weights in the package, and that docs/nano.md tells it."""

import json
import pathlib

import pytest

import vl3_jax as vl3
from data_pipelines.synthetic.registry import JUDGED
from data_pipelines.synthetic.tokenizer import TOKENIZER
from vl3_jax.checkpoint import bundled
from vl3_jax.cli.main import main
from vl3_jax.model import preset

RESULTS = pathlib.Path(__file__).parents[2] / "docs" / "nano" / "results.json"
LARGEST = 12e6  # bytes of the folder
SAME = 0.01  # by which scores may differ on another machine
OTHER_SEED = 0.05  # by which the means of two trainings may differ
FEW = 40  # questions, of which the score lies within so much of that of all
NEAR = 0.2


@pytest.fixture(scope="module")
def tasks():
    """The scores of docs/nano.md."""
    return json.loads(RESULTS.read_text())["tasks"]


def scores(out, *flags):
    assert main(["eval", "--model", "nano", "--out", str(out), *flags]) == 0
    return json.loads((out / "scores.json").read_text())["tasks"]


def mean(tasks, key):
    found = [one[key] for one in tasks.values() if key in one]
    return sum(found) / len(found)


def test_the_folder_is_small_and_complete():
    assert sum(file.stat().st_size for file in bundled.FOLDER.iterdir()) <= LARGEST
    assert (bundled.FOLDER / "tokenizer.json").read_bytes() == TOKENIZER.read_bytes()
    config = vl3.load("nano").engine.model.config
    assert config.num_parameters == preset("nano").num_parameters


def test_every_task_was_asked_often_enough(tasks):
    assert list(tasks) == [f"nano/{name}" for name in JUDGED]
    assert all(one["count"] >= 200 for one in tasks.values())
    assert all(one["score"] >= one["goal"] for one in tasks.values() if "goal" in one)


def test_it_looks_at_what_it_is_asked_about(tasks):
    assert all(one["blind"] <= one["majority"] + 0.05 for one in tasks.values() if "blind" in one)
    assert sum("blind" in one for one in tasks.values()) == len(JUDGED) - 1  # all but sums


def test_pruning_costs_nothing_and_takes_half_of_still_clips(tasks):
    moving = {name: one for name, one in tasks.items() if "unpruned" in one}
    assert mean(moving, "unpruned") - mean(moving, "score") <= 0.01
    assert tasks["nano/static"]["kept"] <= 0.5


def test_another_seed_gives_as_good_a_model(tasks):
    assert all("second" in one for one in tasks.values())
    assert abs(mean(tasks, "score") - mean(tasks, "second")) <= OTHER_SEED


def test_the_weights_are_those_of_the_scores(tasks, tmp_path):
    names = ["nano/digit", "nano/colour", "nano/static"]
    found = scores(tmp_path, "--tasks", ",".join(names), "--count", str(FEW))
    assert all(abs(found[name]["score"] - tasks[name]["score"]) <= NEAR for name in names)


@pytest.mark.slow
def test_all_scores_again(tasks, tmp_path):
    count = str(tasks["nano/digit"]["count"])
    found = scores(tmp_path, "--tasks", "nano", "--count", count)
    for name, one in found.items():
        assert one["score"] == pytest.approx(tasks[name]["score"], abs=SAME), name
        assert one["majority"] == tasks[name]["majority"]
