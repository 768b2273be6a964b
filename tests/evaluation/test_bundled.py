"""The bundled weights: size, scores as in docs/nano.md, and the criteria that the scores must meet."""

import json
import pathlib

import pytest

import vl3_jax as vl3
from data_pipelines.synthetic.registry import EVALUATED_TASKS
from data_pipelines.synthetic.tokenizer import TOKENIZER
from vl3_jax.checkpoint.opening import NANO_FOLDER
from vl3_jax.cli.main import main
from vl3_jax.model import abstract_params, num_parameters, preset

RESULTS = pathlib.Path(__file__).parents[2] / "docs" / "nano" / "results.json"
MAX_BYTES = 12e6  # of the folder
SCORE_TOLERANCE = 0.01  # between machines
SEED_TOLERANCE = 0.05  # between the mean scores of two trainings
FEW = 40  # questions of a quick check
FEW_TOLERANCE = 0.2  # between the score of a quick check and that of all questions


@pytest.fixture(scope="module")
def tasks():
    """The results behind docs/nano.md, by task."""
    return json.loads(RESULTS.read_text())["tasks"]


def scores(out, *flags):
    assert main(["eval", "--model", "nano", "--out", str(out), *flags]) == 0
    tasks = json.loads((out / "results.json").read_text())["tasks"]
    return {name: task["metrics"] for name, task in tasks.items()}


def mean(tasks, key):
    values = [task[key] for task in tasks.values() if key in task]
    return sum(values) / len(values)


def test_the_folder_is_small_and_complete():
    assert sum(file.stat().st_size for file in NANO_FOLDER.iterdir()) <= MAX_BYTES
    assert (NANO_FOLDER / "tokenizer.json").read_bytes() == TOKENIZER.read_bytes()
    config = vl3.load("nano").engine.model.config
    assert num_parameters(abstract_params(config)) == num_parameters(abstract_params(preset("nano")))


def test_every_task_has_enough_questions_and_meets_its_goal(tasks):
    assert list(tasks) == [f"nano/{name}" for name in EVALUATED_TASKS]
    assert all(task["count"] >= 200 for task in tasks.values())
    assert all(task["score"] >= task["goal"] for task in tasks.values() if "goal" in task)


def test_other_media_give_the_score_of_a_constant_answer(tasks):
    assert all(task["blind"] <= task["majority"] + 0.05 for task in tasks.values() if "blind" in task)
    assert sum("blind" in task for task in tasks.values()) == len(EVALUATED_TASKS) - 1  # all but sums


def test_pruning_costs_nothing_and_removes_half_of_static_videos(tasks):
    videos = {name: task for name, task in tasks.items() if "unpruned" in task}
    assert mean(videos, "unpruned") - mean(videos, "score") <= 0.01
    assert tasks["nano/static"]["kept"] <= 0.5


def test_another_seed_gives_as_good_a_model(tasks):
    assert all("second" in task for task in tasks.values())
    assert abs(mean(tasks, "score") - mean(tasks, "second")) <= SEED_TOLERANCE


def test_the_weights_have_the_documented_scores(tasks, tmp_path):
    names = ["nano/digit", "nano/colour", "nano/static"]
    results = scores(tmp_path, "--tasks", ",".join(names), "--count", str(FEW))
    assert all(abs(results[name]["Overall"] / 100 - tasks[name]["score"]) <= FEW_TOLERANCE for name in names)


@pytest.mark.slow
def test_all_scores_are_reproducible(tasks, tmp_path):
    count = str(tasks["nano/digit"]["count"])
    results = scores(tmp_path, "--tasks", "nano", "--count", count)
    for name, task in results.items():
        assert task["Overall"] / 100 == pytest.approx(tasks[name]["score"], abs=SCORE_TOLERANCE), name
        assert task["constant answer"] == pytest.approx(100 * tasks[name]["majority"])
