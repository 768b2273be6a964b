"""Speed of the runner: questions side by side against one at a time, on nano."""

import time

import pytest

import vl3_jax as vl3
from vl3_jax.evaluation.benchmarks import find
from vl3_jax.evaluation.benchmarks.synthetic import QuestionSelection
from vl3_jax.evaluation.prompts import questions_of
from vl3_jax.evaluation.runner import Runner

TASKS = ("nano/digit", "nano/caption", "nano/when", "nano/static")


@pytest.mark.slow
def test_questions_side_by_side():
    """At least three times the questions a second of one at a time, everything compiled."""

    def questions(seed, count):
        benchmarks = find(TASKS, QuestionSelection(count=count, seed=seed))
        return [question for b in benchmarks for question in questions_of(b, b.items(), {})]

    speeds = {}
    for batch_size, count in ((1, 8), (32, 48)):
        chat_model = vl3.load("nano")
        runner = Runner(chat_model, batch_size=batch_size)
        list(runner.ask(questions(1, count)))  # compiles
        asked, started = questions(2, count), time.perf_counter()
        assert len(list(runner.ask(asked))) == len(asked)
        speeds[batch_size] = len(asked) / (time.perf_counter() - started)
    print(f"{speeds[1]:.1f} questions a second one at a time, {speeds[32]:.1f} side by side")
    assert speeds[32] >= 3 * speeds[1]
