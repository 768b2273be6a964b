"""Scores and their table, from hand-written answers."""

import json

import pytest

from vl3_jax.errors import InputError
from vl3_jax.evaluation import scores


def record(task, number, answer, reference, kept=None):
    counts = {} if kept is None else {"visual_tokens": kept, "visual_tokens_before_pruning": 10}
    return {"id": f"{task}/{number}", "task": task, "answer": answer, "reference": reference} | counts


RECORDS = [
    *(record("nano/digit", n, answer, {"answer": "7"}, 10) for n, answer in enumerate(["7", " 7. ", "1", "seven"])),
    record("nano/digit", 4, "3", {"answer": "3"}, 10),
    record("nano/when", 0, "2.0-4.0 s", {"answer": "2.0-6.0 s", "span": [2.0, 6.0]}, 2),
    record("nano/stream", 0, ["5", None, "1"], {"answer": "5, 2", "words": ["5", "2", None]}, 4),
    record("nano/addition", 0, "12", {"answer": "12"}),
]


def test_scores_by_task_and_their_mean():
    results = scores.score(RECORDS)
    digit, when, stream, addition = results["tasks"].values()
    assert list(results["tasks"]) == ["nano/digit", "nano/when", "nano/stream", "nano/addition"]
    assert (digit["score"], digit["majority"], digit["count"], digit["kept"]) == (0.6, 0.8, 5, 1.0)
    assert (when["metric"], when["score"], when["kept"]) == ("span", 0.5, 0.2)
    assert stream["score"] == pytest.approx(0.5)
    assert stream["words"] == 1
    assert "kept" not in addition
    assert results["mean"]["score"] == pytest.approx((0.6 + 0.5 + 0.5 + 1) / 4)


def test_the_table_has_a_line_for_each_task_and_the_mean(tmp_path):
    results = scores.score(RECORDS)
    lines = scores.table(results).splitlines()
    assert lines[0].split() == ["task", "metric", "score", "majority", "questions", "kept"]
    assert lines[1].split() == ["nano/digit", "exact", "0.600", "0.800", "5", "100%"]
    assert "wait_f1" in lines[3]
    assert lines[-1].split()[0] == "mean"
    assert "4 tasks" in lines[-1]
    assert json.loads(scores.save(results, tmp_path / "new").read_text()) == results


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no answers"),
        ([record("tennis/serve", 0, "x", {"answer": "x"})], "unknown"),
        ([record("nano/when", 0, "x", {"answer": "x"})], "nano/when"),
        ([record("nano/stream", 0, 5, {"answer": "x", "words": ["x"]})], "nano/stream"),
    ],
)
def test_unscorable_answers_are_one_line(records, message):
    with pytest.raises(InputError, match=message) as error:
        scores.score(records)
    assert "\n" not in str(error.value)
