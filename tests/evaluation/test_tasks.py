"""Tasks by name, their questions, and the blind swap of media."""

import json

import numpy as np
import pytest

from data_pipelines.synthetic.registry import EVALUATED_TASKS, example
from vl3_jax.errors import InputError
from vl3_jax.evaluation.tasks import QuestionSelection, find, swap_media


def test_a_family_has_all_of_its_tasks_and_duplicates_are_dropped():
    assert [task.name for task in find(["nano"])] == [f"nano/{name}" for name in EVALUATED_TASKS]
    names = [task.name for task in find(["nano/stream", "nano/digit", "nano/stream"])]
    assert names == ["nano/stream", "nano/digit"]
    assert len(find(["nano/digit", "nano"])) == len(EVALUATED_TASKS)


@pytest.mark.parametrize("name", ["", "digit", "nano/", "nano/tennis", "video_mme"])
def test_unknown_tasks_are_one_line(name):
    with pytest.raises(InputError, match="unknown") as error:
        find([name])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", EVALUATED_TASKS)
def test_questions_are_the_generated_samples(name):
    (task,) = find([f"nano/{name}"])
    questions = task.questions(QuestionSelection(count=3, seed=5))
    assert len({question.id for question in questions}) == 3
    for number, question in enumerate(questions):
        sample = example(name, "test", 5, number)
        media = question.media()
        assert question.text == sample.question
        assert bool(media) == task.has_media
        for part, medium in zip(media, sample.media, strict=True):
            assert np.array_equal(part[part["type"]], medium.pixels())
        assert json.loads(json.dumps(question.reference)) == {k: v for k, v in sample.reference.items() if k != "media"}
    assert task.is_stream == (name == "stream")


@pytest.mark.parametrize("name", [name for name in EVALUATED_TASKS if name not in ("addition", "stream")])
def test_reference_answers_score_1_and_fit(name, chat_model):
    (task,) = find([f"nano/{name}"])
    questions = task.questions(QuestionSelection(count=20))
    answers = [example(name, "test", 7, number).answer for number in range(20)]
    scores = task.evaluate(answers, [question.reference for question in questions])
    assert scores["score"] == 1
    assert scores["count"] == 20
    tokens = max(len(chat_model.processor.tokenizer.encode(answer)) for answer in answers)
    assert tokens < task.max_new_tokens


def test_blind_gives_each_question_the_media_of_another():
    (task,) = find(["nano/digit"])
    questions = task.questions(QuestionSelection(count=4))
    swapped = swap_media(questions)
    for question, blind in zip(questions, swapped, strict=True):
        assert (blind.id, blind.text, blind.reference) == (question.id, question.text, question.reference)
    for blind, other in zip(swapped, [*questions[1:], questions[0]], strict=True):
        assert np.array_equal(blind.media()[0]["image"], other.media()[0]["image"])
    with pytest.raises(InputError, match="at least 2"):
        swap_media(questions[:1])


@pytest.mark.parametrize("values", [{"count": 0}, {"seed": -1}])
def test_impossible_selections_are_errors(values):
    with pytest.raises(InputError):
        QuestionSelection(**values)
