"""Rules that read answers: any text is read without an exception, and scores stay within their bounds."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.benchmark_items import CASES
from support.media import DATA
from vl3_jax.evaluation import benchmarks, vectors
from vl3_jax.evaluation.benchmark import Scoring
from vl3_jax.evaluation.scorers import choice_candidates, intervals, letters, math_answer, open_answers, text_distance
from vl3_jax.evaluation.scorers.unparsed import UnparsedError

WORDS = [
    "A",
    "(B)",
    "b.",
    "answer",
    "Answer:",
    "The answer is ",
    "\\boxed{",
    "}",
    "\\frac12",
    "\\sqrt",
    "=",
    "1,200",
    "-3",
]
WORDS += [
    "0.5",
    "5%",
    "yes",
    "no",
    " to ",
    "-",
    "nan",
    "inf",
    "1e999",
    "9" * 400,
    "[1, 2]",
    "\n",
    "\n\n",
    "²",
    "٣",
    "'",
    "",
]
RESPONSES = st.one_of(
    st.text(), st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join), st.lists(st.sampled_from(WORDS)).map("".join)
)
SCORINGS = [
    Scoring(official, variant, judge)
    for official, variant, judge in itertools.product(
        (False, True), (None, "original", "offline"), (None, lambda name, fields: "True")
    )
]


def _references():
    """Returns a reference of every kind of item of each benchmark."""
    found = {}
    for vector in vectors.read(DATA / "evaluation" / "scores.jsonl"):
        extra = vector["extra"]
        if extra["kind"] == "item":
            key = tuple(extra.get(key) for key in ("question_type", "answer_type", "question_format", "dataset_name"))
            found[vector["benchmark"], key] = {**extra, "target": vector["target"]}
    return [(benchmarks.find([name])[0], reference) for (name, _), reference in found.items()]


REFERENCES = _references()


def check_score(benchmark, reference, response, scoring):
    most = float("inf") if benchmark.name == "charades_sta" and scoring.official else 1
    assert 0 <= benchmark.score(response, reference, scoring).score <= most


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(REFERENCES), RESPONSES, st.sampled_from(SCORINGS))
def test_any_response_has_a_score(kind, response, scoring):
    check_score(*kind, response, scoring)


@pytest.mark.parametrize("response", ["9" * 2048, "\\boxed{" * 500, "(" * 2000, "is " * 700])
def test_long_responses_have_a_score(response):
    for kind in REFERENCES:
        for scoring in (Scoring(), Scoring(official=True)):
            check_score(*kind, response, scoring)


def test_a_number_beyond_pythons_limit_is_no_answer():
    digits = "9" * 5000
    assert open_answers.parse_open(digits) == [float("inf")]
    assert not math_answer.equal_numbers(f"{digits}/{digits}", "1")


@settings(deadline=None)
@given(RESPONSES)
def test_reading_never_fails(response):
    options = ["one", "Two.", ""]
    assert letters.tail(response) in response
    assert letters.last_letter(response, 4) in (None, *"ABCD")
    open_answers.parse_open(response)
    math_answer.equal_numbers(response, response)
    for parse in (choice_candidates.parse_choice, choice_candidates.parse_choice_pro):
        try:
            assert isinstance(parse(response, options), str)
        except UnparsedError:
            continue


@given(st.text(max_size=12), st.text(max_size=12))
def test_edit_distance(first, second):
    distance = text_distance.levenshtein(first, second)
    assert distance == text_distance.levenshtein(second, first)
    assert (distance == 0) == (first == second)
    assert abs(len(first) - len(second)) <= distance <= max(len(first), len(second))


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), max_size=5),
    st.tuples(st.floats(0, 100), st.floats(0, 100)),
)
def test_merged_intervals_never_exceed_one(spans, target):
    assert 0 <= intervals.temporal_iou(spans, target, merge=True) <= 1 + 1e-9


@pytest.mark.parametrize(
    ("response", "spans"),
    [("36. to 40", [(36, 40)]), ("00:05", [(0, 5)]), ("1 to 2 to 3", [(1, 2)]), ("at 7", []), ("5-8-9", [(5, 8)])],
)
def test_intervals(response, spans):
    assert intervals.find_intervals(response) == spans


def test_cases_cover_all():
    assert {case.benchmark for case in CASES.values()} == set(benchmarks.BENCHMARKS)
