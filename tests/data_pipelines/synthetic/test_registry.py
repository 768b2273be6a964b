"""Samples are pure functions of task, split, seed and number; splits share nothing; questions give nothing away."""

import collections
import hashlib
import itertools
import json

import numpy as np
import pytest

from data_pipelines.synthetic.image_pool import SPLITS, open_image_pool
from data_pipelines.synthetic.registry import EXACT, JUDGED, TASKS, example, examples
from data_pipelines.synthetic.scenes import SyntheticVideo
from data_pipelines.synthetic.stages import STAGES, shares
from data_pipelines.synthetic.tasks.text import split_of_sum
from data_pipelines.synthetic.vocabulary import FASHION, NAMES
from vl3_jax.errors import InputError


def digest(one):
    said = json.dumps([one.turns, one.said, one.truth])
    return hashlib.blake2b(said.encode() + b"".join(medium.pixels().tobytes() for medium in one.media)).hexdigest()


@pytest.mark.parametrize("task", TASKS)
def test_any_sample_at_any_time_is_the_same(task):
    forward = [digest(one) for one in examples(task, "train", 3, 6)]
    assert [digest(example(task, "train", 3, number)) for number in (5, 2, 0, 2)] == [forward[n] for n in (5, 2, 0, 2)]
    assert len(set(forward)) == 6
    assert digest(example(task, "train", 4, 0)) != forward[0]
    assert digest(example(task, "test", 3, 0)) != forward[0]


def test_splits_share_no_picture():
    hashes = {}
    for split in SPLITS:
        image_pool = open_image_pool(split)
        hashes[split] = {picture.tobytes() for images in image_pool.images.values() for picture in images}
        assert len(hashes[split]) > 500
    for one, other in itertools.combinations(SPLITS, 2):
        assert not hashes[one] & hashes[other]


def test_splits_share_no_sum():
    asked = {split: set() for split in SPLITS}
    for split in SPLITS:
        for one in examples("addition", split, 0, 300):
            numbers = [int(number) for number in "".join(c if c.isdigit() else " " for c in one.question).split()]
            assert sum(numbers) == int(one.answer) <= 99
            assert split_of_sum(*numbers) == split_of_sum(*reversed(numbers)) == split
            asked[split].add(frozenset(numbers))
    for one, other in itertools.combinations(SPLITS, 2):
        assert not asked[one] & asked[other]


@pytest.mark.parametrize(
    "task", [name for name in JUDGED if TASKS[name].metric == EXACT and TASKS[name].media != "text"]
)
def test_a_question_does_not_tell_its_answer(task):
    """By question alone nobody does much better than by always giving the most frequent answer."""
    drawn = [(one.question, one.answer) for one in examples(task, "test", 1, 600)]
    answers = collections.Counter(answer for _, answer in drawn)
    by_question = collections.defaultdict(collections.Counter)
    for question, answer in drawn:
        by_question[question][answer] += 1
    told = {question: counts for question, counts in by_question.items() if counts.total() >= 60}
    if told:
        known = sum(max(counts.values()) for counts in told.values()) / sum(c.total() for c in told.values())
        assert known <= answers.most_common(1)[0][1] / len(drawn) + 0.06


def test_answers_are_evenly_spread():
    for task, expected in [("digit", 10), ("fashion", 10), ("position", 9), ("count", 5), ("motion", 4), ("same", 2)]:
        counts = collections.Counter(one.answer for one in examples(task, "test", 2, 400))
        assert len(counts) == expected
        assert max(counts.values()) < 400 / expected * 1.6


def test_sizes_are_small_and_varied():
    for name, task in TASKS.items():
        sizes = collections.Counter()
        for one in examples(name, "train", 0, 60):
            for medium in one.media:
                sizes[medium.height, medium.width] += 1
                patches = round(medium.height / 14) * round(medium.width / 14)
                assert 16 <= patches <= 100
                if isinstance(medium, SyntheticVideo):
                    assert 4 <= medium.frames <= 8
                    assert patches <= 36
        assert task.media == "text" or len(sizes) >= 3


def test_stages_keep_what_was_learned():
    known = set()
    for stage in sorted(STAGES):
        assert known <= set(STAGES[stage])
        known |= set(STAGES[stage])
        assert sum(shares(stage).values()) == pytest.approx(1)
    assert known == set(TASKS)


@pytest.fixture
def mine():
    """Pictures that are nobody's, of other sizes and numbers."""
    return {
        "digit_images": np.full((10, 9, 12), 255, np.uint8),
        "digit_labels": np.arange(10),
        "fashion_images": np.full((20, 30, 20), 255, np.uint8),
        "fashion_labels": np.arange(20) % 10,
    }


def test_other_pictures_same_questions(tmp_path, mine):
    np.savez(tmp_path / "mine.npz", **mine)
    for task in TASKS:
        own, others = examples(task, "test", 0, 20), examples(task, "test", 0, 20, tmp_path / "mine.npz")
        for one, other in zip(own, others, strict=True):
            assert [question for question, _ in one.turns] == [question for question, _ in other.turns]
            assert one.said == other.said
            for (_, answer), (_, same) in zip(one.turns, other.turns, strict=True):
                assert answer == same or "<ref>" in answer
    (one,) = examples("fashion", "test", 0, 1, tmp_path / "mine.npz")
    assert one.answer == FASHION[one.truth["media"][0]["objects"][0]["picture"] % 10]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"digit_labels": np.zeros(10, int)}, "0 to 9"),
        ({"digit_labels": np.arange(10.0)}, "0 to 9"),
        ({"digit_images": np.zeros((10, 9), np.uint8)}, "uint8"),
        ({"digit_images": np.zeros((10, 9, 9), np.uint8)}, "lighter"),
        ({"digit_images": np.full((10, 4, 4), 255, np.uint8)}, "pixels"),
        ({"fashion_images": None}, "lacks fashion_images"),
    ],
)
def test_bad_pictures(tmp_path, mine, change, complaint):
    np.savez(tmp_path / "bad.npz", **{name: array for name, array in (mine | change).items() if array is not None})
    with pytest.raises(InputError, match=complaint):
        open_image_pool("test", tmp_path / "bad.npz")


def test_no_pictures(tmp_path):
    (tmp_path / "noise.npz").write_bytes(b"nothing")
    for path, complaint in [("noise.npz", "not an npz"), ("gone.npz", "no such file")]:
        with pytest.raises(InputError, match=complaint):
            open_image_pool("test", tmp_path / path)


def test_unknown_names():
    with pytest.raises(InputError, match="task 'dgit' is unknown"):
        example("dgit", "train", 0, 0)
    with pytest.raises(InputError, match="split 'tst' is unknown"):
        example("digit", "tst", 0, 0)


def test_banks_have_every_name():
    for split in SPLITS:
        image_pool = open_image_pool(split)
        for kind, by_name in image_pool.by_name.items():
            assert tuple(by_name) == NAMES[kind]
            assert all(len(numbers) >= 20 for numbers in by_name.values())
