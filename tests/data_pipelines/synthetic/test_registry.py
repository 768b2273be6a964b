"""Samples are pure functions of task, split, seed and number; splits are disjoint; questions do not leak answers."""

import collections
import hashlib
import itertools
import json

import numpy as np
import pytest

from data_pipelines.synthetic.image_pool import SPLITS, open_image_pool
from data_pipelines.synthetic.registry import EVALUATED_TASKS, EXACT, TASKS, example, examples
from data_pipelines.synthetic.scenes import SyntheticVideo
from data_pipelines.synthetic.stages import STAGES, shares
from data_pipelines.synthetic.tasks.text import split_of_sum
from data_pipelines.synthetic.vocabulary import FASHION, NAMES
from vl3_jax.errors import InputError


def digest(sample):
    text = json.dumps([sample.turns, sample.utterances, sample.reference])
    return hashlib.blake2b(text.encode() + b"".join(medium.pixels().tobytes() for medium in sample.media)).hexdigest()


@pytest.mark.parametrize("task", TASKS)
def test_samples_do_not_depend_on_order(task):
    forward = [digest(sample) for sample in examples(task, "train", 3, 6)]
    assert [digest(example(task, "train", 3, number)) for number in (5, 2, 0, 2)] == [forward[n] for n in (5, 2, 0, 2)]
    assert len(set(forward)) == 6
    assert digest(example(task, "train", 4, 0)) != forward[0]
    assert digest(example(task, "test", 3, 0)) != forward[0]


def test_splits_share_no_image():
    hashes = {}
    for split in SPLITS:
        image_pool = open_image_pool(split)
        hashes[split] = {image.tobytes() for images in image_pool.images.values() for image in images}
        assert len(hashes[split]) > 500
    for split, other in itertools.combinations(SPLITS, 2):
        assert not hashes[split] & hashes[other]


def test_splits_share_no_sum():
    sums = {split: set() for split in SPLITS}
    for split in SPLITS:
        for sample in examples("addition", split, 0, 300):
            numbers = [int(number) for number in "".join(c if c.isdigit() else " " for c in sample.question).split()]
            assert sum(numbers) == int(sample.answer) <= 99
            assert split_of_sum(*numbers) == split_of_sum(*reversed(numbers)) == split
            sums[split].add(frozenset(numbers))
    for split, other in itertools.combinations(SPLITS, 2):
        assert not sums[split] & sums[other]


@pytest.mark.parametrize(
    "task", [name for name in EVALUATED_TASKS if TASKS[name].metric == EXACT and TASKS[name].media != "text"]
)
def test_a_question_does_not_leak_its_answer(task):
    """The best answer to each wording of a question is hardly better than the most frequent answer."""
    pairs = [(sample.question, sample.answer) for sample in examples(task, "test", 1, 600)]
    answers = collections.Counter(answer for _, answer in pairs)
    by_question = collections.defaultdict(collections.Counter)
    for question, answer in pairs:
        by_question[question][answer] += 1
    frequent = {question: counts for question, counts in by_question.items() if counts.total() >= 60}
    if frequent:
        hits = sum(max(counts.values()) for counts in frequent.values())
        accuracy = hits / sum(counts.total() for counts in frequent.values())
        assert accuracy <= answers.most_common(1)[0][1] / len(pairs) + 0.06


def test_answers_are_evenly_spread():
    for task, expected in [("digit", 10), ("fashion", 10), ("position", 9), ("count", 5), ("motion", 4), ("same", 2)]:
        counts = collections.Counter(sample.answer for sample in examples(task, "test", 2, 400))
        assert len(counts) == expected
        assert max(counts.values()) < 400 / expected * 1.6


def test_sizes_are_small_and_varied():
    for name, task in TASKS.items():
        sizes = collections.Counter()
        for sample in examples(name, "train", 0, 60):
            for medium in sample.media:
                sizes[medium.height, medium.width] += 1
                patches = round(medium.height / 14) * round(medium.width / 14)
                assert 16 <= patches <= 100
                if isinstance(medium, SyntheticVideo):
                    assert 4 <= medium.num_frames <= 8
                    assert patches <= 36
        assert task.media == "text" or len(sizes) >= 3


def test_stages_keep_the_tasks_of_earlier_stages():
    earlier = set()
    for stage in sorted(STAGES):
        assert earlier <= set(STAGES[stage])
        earlier |= set(STAGES[stage])
        assert sum(shares(stage).values()) == pytest.approx(1)
    assert earlier == set(TASKS)


@pytest.fixture
def blank_images():
    """White images of other sizes and numbers than those of the splits."""
    return {
        "digit_images": np.full((10, 9, 12), 255, np.uint8),
        "digit_labels": np.arange(10),
        "fashion_images": np.full((20, 30, 20), 255, np.uint8),
        "fashion_labels": np.arange(20) % 10,
    }


def test_other_images_same_questions(tmp_path, blank_images):
    np.savez(tmp_path / "mine.npz", **blank_images)
    for task in TASKS:
        own, others = examples(task, "test", 0, 20), examples(task, "test", 0, 20, tmp_path / "mine.npz")
        for sample, other in zip(own, others, strict=True):
            assert [question for question, _ in sample.turns] == [question for question, _ in other.turns]
            assert sample.utterances == other.utterances
            for (_, answer), (_, other_answer) in zip(sample.turns, other.turns, strict=True):
                assert answer == other_answer or "<ref>" in answer
    (sample,) = examples("fashion", "test", 0, 1, tmp_path / "mine.npz")
    assert sample.answer == FASHION[sample.reference["media"][0]["objects"][0]["image_index"] % 10]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digit_labels": np.zeros(10, int)}, "0 to 9"),
        ({"digit_labels": np.arange(10.0)}, "0 to 9"),
        ({"digit_images": np.zeros((10, 9), np.uint8)}, "uint8"),
        ({"digit_images": np.zeros((10, 9, 9), np.uint8)}, "lighter"),
        ({"digit_images": np.full((10, 4, 4), 255, np.uint8)}, "pixels"),
        ({"fashion_images": None}, "lacks fashion_images"),
    ],
)
def test_bad_images(tmp_path, blank_images, change, message):
    np.savez(
        tmp_path / "bad.npz", **{name: array for name, array in (blank_images | change).items() if array is not None}
    )
    with pytest.raises(InputError, match=message):
        open_image_pool("test", tmp_path / "bad.npz")


def test_missing_images(tmp_path):
    (tmp_path / "noise.npz").write_bytes(b"nothing")
    for path, message in [("noise.npz", "not an npz"), ("gone.npz", "no such file")]:
        with pytest.raises(InputError, match=message):
            open_image_pool("test", tmp_path / path)


def test_unknown_names():
    with pytest.raises(InputError, match="task 'dgit' is unknown"):
        example("dgit", "train", 0, 0)
    with pytest.raises(InputError, match="split 'tst' is unknown"):
        example("digit", "tst", 0, 0)


def test_image_pools_have_every_name():
    for split in SPLITS:
        image_pool = open_image_pool(split)
        for kind, by_name in image_pool.by_name.items():
            assert tuple(by_name) == NAMES[kind]
            assert all(len(indices) >= 20 for indices in by_name.values())
