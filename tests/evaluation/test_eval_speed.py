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
    """Faster than one at a time, everything compiled.

    On two cores no more than that: nano's answers have few tokens, and of the 11 to 13 ms of a question alone, 4.5 go
    to the tower and to reading the prompt, which take as long for many as one after the other, and 2.2 to preparing,
    which takes its time from the same cores. tests/inference/test_engine_speed.py has what rows gain otherwise.
    """

    def questions(seed, count):
        benchmarks = find(TASKS, QuestionSelection(count=count, seed=seed))
        return [question for b in benchmarks for question in questions_of(b, b.items(), {})]

    def rate(ask, count):
        ask(questions(1, count))  # compiles
        asked, started = questions(2, count), time.perf_counter()
        ask(asked)
        return len(asked) / (time.perf_counter() - started)

    def one_at_a_time(asked):
        for question in asked:
            alone.answer(question.item.messages(None), max_new_tokens=question.benchmark.max_new_tokens)

    alone, runners = vl3.load("nano"), {rows: Runner(vl3.load("nano"), batch_size=rows) for rows in (1, 32)}
    speeds = {rows: rate(lambda asked, runner=runner: list(runner.ask(asked)), 48) for rows, runner in runners.items()}
    speeds[0] = rate(one_at_a_time, 12)
    print(f"questions a second: {speeds[0]:.1f} one at a time, {speeds[1]:.1f} ahead, {speeds[32]:.1f} side by side")
    assert speeds[32] >= 1.1 * speeds[0]
