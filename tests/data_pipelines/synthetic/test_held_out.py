"""The training data of nano and the questions of its evaluation have no image, sum or scene in common."""

import hashlib

import pytest

from data_pipelines import mixtures
from data_pipelines.synthetic.image_pool import open_image_pool
from data_pipelines.synthetic.registry import EVALUATED_TASKS, example
from data_pipelines.synthetic.source import SyntheticSource, parse_url
from data_pipelines.synthetic.stages import STAGES
from data_pipelines.synthetic.tasks.text import split_of_sum
from vl3_jax.evaluation.benchmarks.synthetic import QuestionSelection
from vl3_jax.storage.file_digests import FileDigests
from vl3_jax.training import run_config

SEEDS = (0, 1)  # of two trainings
SELECTION = QuestionSelection()


def stage_data(stage, seed):
    """Returns the specs of a stage's training data, and the evaluation data of its configuration."""
    config = run_config.load(f"nano:{stage}", [f"data.seed={seed}"])
    paths = [path for spec in mixtures.dataset_specs(config.data) for path in spec.annotations]
    return [parse_url(path) for path in paths], config.eval.annotations


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_samples_from_the_training_split(stage):
    for seed in SEEDS:
        specs, eval_annotations = stage_data(stage, seed)
        assert {task for spec in specs for task in spec.tasks} == set(STAGES[stage])
        assert all(spec.split == "train" and spec.images is None for spec in specs)
        assert not eval_annotations


def test_no_two_stages_or_trainings_have_the_same_seed():
    seeds = [{spec.seed for spec in stage_data(stage, seed)[0]} for seed in SEEDS for stage in STAGES]
    assert all(len(stage_seeds) == 1 for stage_seeds in seeds)
    assert len(set.union(*seeds)) == len(seeds)


def test_questions_show_images_that_training_lacks():
    assert SELECTION.split == "test"
    train, test = open_image_pool("train"), open_image_pool("test")
    train_images = {image.tobytes() for images in train.images.values() for image in images}
    assert not any(image.tobytes() in train_images for images in test.images.values() for image in images)
    for stage in STAGES:
        for spec in stage_data(stage, 0)[0]:
            assert SyntheticSource(spec).fingerprint(FileDigests())[5] == train.digest


def test_questions_ask_for_sums_that_training_lacks():
    for number in range(SELECTION.count):
        question = example("addition", SELECTION.split, SELECTION.seed, number).question
        terms = [int(word) for word in "".join(c if c.isdigit() else " " for c in question).split()]
        assert split_of_sum(*terms) != "train"


@pytest.mark.parametrize("task", [name for name in EVALUATED_TASKS if name != "addition"])
def test_no_scene_of_a_question_is_in_training(task):
    """Also with equal seeds, because the split is part of the seed of the random generator."""
    test_scenes = {scene_digest(task, SELECTION.split, SELECTION.seed, number) for number in range(5)}
    seeds = {SELECTION.seed, *(stage_data(stage, seed)[0][0].seed for seed in SEEDS for stage in STAGES)}
    assert not test_scenes & {scene_digest(task, "train", seed, number) for seed in seeds for number in range(5)}


def scene_digest(task, split, seed, number):
    sample = example(task, split, seed, number)
    return hashlib.blake2b(b"".join(medium.pixels().tobytes() for medium in sample.media)).hexdigest()
