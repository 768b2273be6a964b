"""The synthetic tasks as benchmarks: their items, their scores, and the blind swap of media."""

import json

import numpy as np
import pytest

from data_pipelines.synthetic.registry import EVALUATED_TASKS, example
from vl3_jax.errors import InputError
from vl3_jax.evaluation import result_tables, results
from vl3_jax.evaluation.benchmark import Scoring
from vl3_jax.evaluation.benchmarks import find
from vl3_jax.evaluation.benchmarks.synthetic import QuestionSelection
from vl3_jax.evaluation.prompts import swap_media


def test_the_family_has_all_of_its_tasks_and_duplicates_are_dropped():
    assert [task.task for task in find(["nano"])] == [f"nano/{name}" for name in EVALUATED_TASKS]
    names = [task.task for task in find(["nano/stream", "AI2D", "nano/digit", "nano/stream"])]
    assert names == ["nano/stream", "AI2D", "nano/digit"]
    assert len(find(["nano/digit", "nano"])) == len(EVALUATED_TASKS)


@pytest.mark.parametrize("name", ["", "digit", "nano/", "nano/tennis", "video_mme"])
def test_unknown_tasks_are_one_line(name):
    with pytest.raises(InputError, match="unknown") as error:
        find([name])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", EVALUATED_TASKS)
def test_items_are_the_generated_samples(name):
    (task,) = find([f"nano/{name}"], QuestionSelection(count=3, seed=5))
    items = task.load(None)
    assert [item.id for item in items] == ["0", "1", "2"]
    for number, item in enumerate(items):
        sample = example(name, "test", 5, number)
        *media, question = item.content(lambda part: ())
        assert question["text"] == sample.question
        assert bool(media) == task.has_media
        for part, medium in zip(media, sample.media, strict=True):
            assert np.array_equal(part[part["type"]], medium.pixels())
        reference = {key: value for key, value in item.reference.items() if key != "target"}
        assert json.loads(json.dumps(reference)) == {k: v for k, v in sample.reference.items() if k != "media"}
        json.dumps(results.answer_record(task.task, item, "x"))
    assert task.is_stream == (name == "stream")


@pytest.mark.parametrize("name", [name for name in EVALUATED_TASKS if name not in ("addition", "stream")])
def test_reference_answers_score_1_and_fit(name, chat_model):
    (task,) = find([f"nano/{name}"], QuestionSelection(count=20))
    items, answers = task.items(), [example(name, "test", 7, number).answer for number in range(20)]
    records = [results.answer_record(task.task, *pair) for pair in zip(items, answers, strict=True)]
    summary = results.score_tasks(records, Scoring())[task.task].summary
    assert (summary["metrics"]["Overall"], summary["n"], summary["headline"]) == (100, 20, {task.task: 100})
    tokens = max(len(chat_model.processor.tokenizer.encode(answer)) for answer in answers)
    assert tokens < task.max_new_tokens


def test_scores_and_their_table():
    def record(task, number, answer, reference, kept=None):
        counts = {} if kept is None else {"visual_tokens": kept, "visual_tokens_before_pruning": 10}
        reference |= {"target": reference["answer"]}
        return {"id": f"{task}/{number}", "task": task, "answer": answer, "reference": reference} | counts

    said = enumerate(["7", " 7. ", "1", "seven"])
    records = [
        *(record("nano/digit", n, answer, {"answer": "7"}, 10) for n, answer in said),
        record("nano/digit", 4, "3", {"answer": "3"}, 10),
        record("nano/when", 0, "2.0-4.0 s", {"answer": "2.0-6.0 s", "span": [2.0, 6.0]}, 2),
        record("nano/stream", 0, ["5", None, "1"], {"answer": "5, 2", "words": ["5", "2", None]}, 4),
        record("nano/addition", 0, None, {"answer": "12"}) | {"error": "out of memory"},
    ]
    content = {"tasks": {task: result.summary for task, result in results.score_tasks(records, Scoring()).items()}}
    digit, when, stream, addition = content["tasks"].values()
    assert digit["metrics"] == {"Overall": 60, "constant answer": 80}
    assert (when["metrics"]["Overall"], when["kept"]) == (50, 0.2)
    assert stream["metrics"]["Overall"] == pytest.approx(50)
    assert stream["metrics"]["words"] == 100
    assert (addition["metrics"]["Overall"], addition["n_error"], addition["kept"]) == (0, 1, None)
    lines = result_tables.as_text(content).splitlines()
    assert lines[0] == "Synthetic tasks"
    assert lines[2].split() == ["nano/digit", "60.0", "80.0", "5", "100%"]
    assert "wait_f1" in lines[4]
    assert lines[-1].split() == ["mean", "40.0", *lines[-1].split()[2:3], "4", "tasks"]


@pytest.mark.parametrize(
    ("answer", "reference"), [("x", {"answer": "x"}), (5, {"answer": "x", "words": ["x"]}), ("x", {})]
)
def test_unscorable_answers_are_one_line(answer, reference):
    record = {"id": "nano/stream/0", "task": "nano/stream", "answer": answer, "reference": reference | {"target": "x"}}
    with pytest.raises(InputError, match="nano/stream/0") as error:
        results.score_tasks([record], Scoring())
    assert "\n" not in str(error.value)


def test_blind_gives_each_question_the_media_of_another():
    (task,) = find(["nano/digit"], QuestionSelection(count=4))
    items = task.items()
    for item, blind, other in zip(items, swap_media(task, items), [*items[1:], items[0]], strict=True):
        assert (blind.id, blind.text, blind.reference, blind.media) == (item.id, item.text, item.reference, other.media)
    with pytest.raises(InputError, match="at least 2"):
        swap_media(task, items[:1])


@pytest.mark.parametrize("values", [{"count": 0}, {"seed": -1}])
def test_impossible_selections_are_errors(values):
    with pytest.raises(InputError):
        QuestionSelection(**values)
