"""Scoring: right answers score 1 in every accepted form, and no model output raises an exception."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.synthetic import parsing
from data_pipelines.synthetic.formats import box_answer, span_answer
from data_pipelines.synthetic.registry import EVALUATED_TASKS, SPEAK, TASKS, examples
from data_pipelines.synthetic.scoring import box_iou, evaluate, score, span_iou, stream_scores

TEXT = st.one_of(st.text(max_size=80), st.text(alphabet="[]<>0123456789.,- stoandref/azA\n", max_size=200))
COORDINATE = st.integers(0, 1000)


def true_answers(task, samples):
    return [sample.reference["words"] if TASKS[task].metric == SPEAK else sample.answer for sample in samples]


@pytest.mark.parametrize("task", EVALUATED_TASKS)
def test_references_score_1(task):
    samples = examples(task, "test", 0, 30)
    references = [dict(sample.reference) for sample in samples]
    scores = evaluate(task, true_answers(task, samples), references)
    assert scores["score"] == pytest.approx(1)
    assert scores["count"] == 30
    assert scores["majority"] < 0.9
    wrong = [[None] * 8] * 30 if TASKS[task].metric == SPEAK else ["I cannot tell"] * 30
    assert evaluate(task, wrong, references)["score"] < 0.5


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_no_answer_raises(text):
    for box in parsing.parse_boxes(text):
        assert len(box) == 4
        assert 0 <= box[0] <= box[2] <= 1000
        assert 0 <= box[1] <= box[3] <= 1000
    for start, end in parsing.parse_spans(text):
        assert 0 <= start <= end
        assert math.isfinite(end)
    parsing.parse_attributes(text)
    assert parsing.normalise(parsing.normalise(text)) == parsing.normalise(text)
    assert 0 <= score("box", text, {"answer": "", "box": [1, 2, 30, 40]}) <= 1
    assert 0 <= score("when", text, {"answer": "", "span": [1.0, 3.0]}) <= 1
    assert 0 <= score("caption", text, {"answer": "a red ring on the left"}) <= 1
    assert score("digit", text, {"answer": "seven of them"}) in (0, 1)


@given(box=st.tuples(COORDINATE, COORDINATE, COORDINATE, COORDINATE))
def test_formatted_boxes_are_parsed(box):
    x0, x1 = sorted(box[::2])
    y0, y1 = sorted(box[1::2])
    assert parsing.parse_boxes(box_answer("bag", (x0, y0, x1, y1))) == [[x0, y0, x1, y1]]


@given(start=st.integers(0, 600), length=st.integers(1, 600))
def test_formatted_spans_are_parsed(start, length):
    assert parsing.parse_spans(span_answer(start, start + length)) == [(start, start + length)]
    assert span_iou([(start, start + length)], (start, start + length)) == 1


def test_other_formats():
    assert parsing.parse_boxes("it is at [[10, 20, 300,400]] or [0.5, 0.1, 1.0, 0.2]") == [
        [10, 20, 300, 400],
        [500, 100, 1000, 200],
    ]
    assert parsing.parse_boxes("[[300,400,10,20]]") == [[10, 20, 300, 400]]
    assert parsing.parse_boxes("[[1,2,3]]") == []
    assert parsing.parse_spans("from 25.6 seconds to 34.6 seconds") == [(25.6, 34.6)]
    assert parsing.parse_spans("3 - 7s, and 9.0 to 12") == [(3, 7), (9, 12)]
    assert parsing.parse_spans("it begins at 3, ends at 7") == [(3, 7)]
    assert parsing.parse_spans("never") == []
    assert parsing.normalise("  The  Ankle Boot. ") == "ankle boot"
    assert score("pair", "A bag and a 3.", {"answer": "bag and 3"}) == 1
    assert score("digit", "70", {"answer": "7"}) == 0
    assert score("digit", "9" * 5000, {"answer": "7"}) == 0


def test_attributes():
    assert parsing.parse_attributes("A white T-shirt at the top left.") == {"t-shirt", "white t-shirt", "at top left"}
    assert parsing.parse_attributes("blue trousers and a red 7") == {"trousers", "blue trousers", "7", "red 7"}
    assert parsing.parse_attributes("an orange ankle boot") == {"ankle boot", "orange ankle boot"}
    assert parsing.parse_attributes("T-shirt") == {"t-shirt"}  # and not a shirt
    reference = {"answer": "a red ring and a blue bag"}
    assert score("caption_of_two", "a blue bag and a red ring", reference) == 1
    assert score("caption_of_two", "a blue ring and a red bag", reference) == pytest.approx(0.5)
    assert score("caption_of_two", "a red ring", reference) == pytest.approx(2 / 3)


def test_ious():
    assert box_iou([0, 0, 10, 10], [0, 0, 10, 5]) == 0.5
    assert box_iou([0, 0, 10, 10], [10, 0, 20, 10]) == 0
    assert box_iou([5, 5, 5, 5], [5, 5, 5, 5]) == 0
    assert span_iou([(0, 4)], (2, 6)) == pytest.approx(1 / 3)
    assert span_iou([(0, 1), (2, 4)], (2, 4)) == pytest.approx(2 / 3)
    assert span_iou([], (2, 4)) == 0
    assert span_iou([(2, 4), (2, 4)], (2, 4)) <= 1


def test_streams():
    references = [["7", None, None, "3"]]
    assert stream_scores([["7", None, None, "4"]], references) == {"score": 1, "wait_f1": 1, "words": 0.5}
    late = stream_scores([[None, "7", None, "3"]], references)
    assert late == {"score": 0.5, "wait_f1": 0.5, "words": 1}
    assert stream_scores([["7"]], references)["score"] == pytest.approx(2 / 3)  # what is missing is silence
    assert stream_scores([[None] * 9], references)["score"] == 0
