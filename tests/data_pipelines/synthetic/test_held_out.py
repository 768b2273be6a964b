"""What nano is judged by is in none of its training: not a picture, not a sum, not a seed."""

import hashlib
import pathlib

import pytest

from data_pipelines import mixtures
from data_pipelines.synthetic.image_pool import open_image_pool
from data_pipelines.synthetic.registry import JUDGED, example
from data_pipelines.synthetic.source import SyntheticSource, parse
from data_pipelines.synthetic.stages import STAGES
from data_pipelines.synthetic.tasks.text import split_of_sum
from vl3_jax import config_file
from vl3_jax.evaluation.tasks import QuestionSelection

CONFIGS = pathlib.Path(__file__).parents[3] / "configs"
SEEDS = (0, 1)  # of two trainings
ASKED = QuestionSelection()


def requests(stage, seed):
    """What a stage draws, and what it is asked about meanwhile."""
    config = config_file.load(CONFIGS / f"nano_stage{stage}.py", [f"data.seed={seed}"])
    paths = [path for spec in mixtures.dataset_specs(config.data) for path in spec.annotations]
    return [parse(path) for path in paths], config.eval.annotations


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_draws_from_the_training_split(stage):
    for seed in SEEDS:
        drawn, asked = requests(stage, seed)
        assert {task for one in drawn for task in one.tasks} == set(STAGES[stage])
        assert all(one.split == "train" and one.images is None for one in drawn)
        assert not asked


def test_no_two_stages_or_trainings_draw_the_same():
    seeds = [{one.seed for one in requests(stage, seed)[0]} for seed in SEEDS for stage in STAGES]
    assert all(len(own) == 1 for own in seeds)
    assert len(set.union(*seeds)) == len(seeds)


def test_questions_show_pictures_that_training_lacks():
    assert ASKED.split == "test"
    training, judged = open_image_pool("train"), open_image_pool("test")
    seen = {picture.tobytes() for images in training.images.values() for picture in images}
    assert not any(picture.tobytes() in seen for images in judged.images.values() for picture in images)
    for stage in STAGES:
        for request in requests(stage, 0)[0]:
            assert SyntheticSource(request).fingerprint()[5] == training.digest


def test_questions_ask_for_sums_that_training_lacks():
    for number in range(ASKED.count):
        question = example("addition", ASKED.split, ASKED.seed, number).question
        terms = [int(word) for word in "".join(c if c.isdigit() else " " for c in question).split()]
        assert split_of_sum(*terms) != "train"


@pytest.mark.parametrize("task", [name for name in JUDGED if name != "addition"])
def test_no_scene_of_a_question_is_in_training(task):
    """Whatever the seed: streams of random numbers belong to a split."""
    asked = {scene(task, ASKED.split, ASKED.seed, number) for number in range(5)}
    seeds = {ASKED.seed, *(requests(stage, seed)[0][0].seed for seed in SEEDS for stage in STAGES)}
    assert not asked & {scene(task, "train", seed, number) for seed in seeds for number in range(5)}


def scene(*which):
    drawn = example(*which)
    return hashlib.blake2b(b"".join(medium.pixels().tobytes() for medium in drawn.media)).hexdigest()
