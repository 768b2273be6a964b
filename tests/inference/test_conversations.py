"""Conversations side by side: preparation ahead of the device, bounded, and what ends early; with a made-up engine."""

import itertools
import threading
import time

import pytest

from vl3_jax.errors import InputError, RunError
from vl3_jax.inference.conversations import ConversationGroup, answer_ahead
from vl3_jax.inference.requests import Generation

PATIENCE = 60  # seconds for what other threads must do
REFUSED = "too long"


class CountingEngine:
    """Answers a request after as many steps as it says."""

    def __init__(self):
        self.rows, self.steps_left, self.largest = 0, {}, 0

    def reserve(self, rows):
        self.rows = rows

    def submit(self, request):
        if request == REFUSED:
            raise InputError("it does not fit")
        generation = Generation(request, self)
        self.steps_left[generation] = request
        self.largest = max(self.largest, len(self.steps_left))
        return generation

    def step(self):
        for generation in list(self.steps_left):
            self.steps_left[generation] -= 1
            if self.steps_left[generation] <= 0:
                generation.finish_reason = "stop"
            if generation.done:
                del self.steps_left[generation]
        return bool(self.steps_left)


def asking(*requests, result):
    """A conversation of some requests."""
    for request in requests:
        generation = yield request
        assert generation.done
    return result


def tolerant(name):
    try:
        yield REFUSED
    except InputError as error:
        return f"{name}: {error}"


@pytest.mark.parametrize("rows", [1, 3, 50])
@pytest.mark.parametrize("threads", [1, 4])
def test_every_conversation_gets_its_result(rows, threads):
    def group(first, size):
        return ConversationGroup(
            size, lambda: [asking(*([n % 5 + 1] * (n % 3)), result=n) for n in range(first, first + size)]
        )

    engine = CountingEngine()
    groups = [group(first, size) for first, size in ((0, 1), (1, 5), (6, 0), (6, 14))]
    assert sorted(answer_ahead(engine, groups, rows, threads)) == list(range(20))
    assert engine.rows == rows
    assert engine.largest <= rows
    assert list(answer_ahead(engine, [], rows)) == []


def test_jobs_are_prepared_ahead_and_no_further():
    """While the first is answered the next ones are prepared; those after them are not even taken."""
    taken, prepared = itertools.count(), threading.Semaphore(0)

    def endless():
        for number in taken:
            yield ConversationGroup(1, lambda number=number: (prepared.release(), [asking(2, result=number)])[1])

    results = answer_ahead(CountingEngine(), endless(), rows=2, threads=2)
    assert next(results) == 0
    assert all(prepared.acquire(timeout=PATIENCE) for _ in range(3)), "one waits while two are answered"
    assert next(taken) <= 6
    results.close()


def test_the_next_is_prepared_while_the_devices_work():
    prepared, count = threading.Semaphore(0), 4

    class WaitingEngine(CountingEngine):
        waits = count - 1

        def step(self):
            self.waits -= 1
            assert self.waits < 0 or prepared.acquire(timeout=PATIENCE), "nothing is prepared during a step"
            return super().step()

    def group(number):
        def prepare():
            if number:
                prepared.release()
            return [asking(1, result=number)]

        return ConversationGroup(1, prepare)

    assert list(answer_ahead(WaitingEngine(), map(group, range(count)), rows=1, threads=1)) == [0, 1, 2, 3]


def test_a_refused_request_is_an_error_inside_its_conversation():
    groups = [ConversationGroup(3, lambda: [tolerant("a"), asking(1, result="b"), tolerant("c")])]
    assert sorted(answer_ahead(CountingEngine(), groups, 2)) == ["a: it does not fit", "b", "c: it does not fit"]
    with pytest.raises(InputError, match="does not fit"):
        list(answer_ahead(CountingEngine(), [ConversationGroup(1, lambda: [asking(REFUSED, result="d")])], 2))


def test_what_is_ready_overtakes_what_is_not():
    """Three rows, of which one waits for a file that comes last."""
    is_last = threading.Event()

    def group(number):
        def prepare():
            assert number or is_last.wait(PATIENCE)  # the first one waits
            return [asking(1, result=number)]

        return ConversationGroup(1, prepare)

    order = []
    for result in answer_ahead(CountingEngine(), map(group, range(6)), rows=3, threads=2):
        order.append(result)
        if len(order) == 5:
            is_last.set()
    assert sorted(order) == list(range(6))
    assert order[-1] == 0


def test_an_answer_that_ends_early_is_an_error_inside_its_conversation():
    class FailingEngine(CountingEngine):
        def step(self):
            for generation in self.steps_left:
                if generation.request == 2:
                    generation.error = RunError("nothing matches")
            return super().step()

    def enduring():
        try:
            yield 2
        except RunError as error:
            return str(error)

    def groups(*conversations):
        return [ConversationGroup(1, lambda each=each: [each]) for each in conversations]

    results = answer_ahead(FailingEngine(), groups(asking(3, result="a"), enduring(), asking(1, result="b")), 2)
    assert sorted(results) == ["a", "b", "nothing matches"]
    with pytest.raises(RunError, match="nothing matches"):
        list(answer_ahead(FailingEngine(), groups(asking(2, result="a")), 2))


def test_the_time_without_work_is_told():
    waits = []

    def group(delay):
        return ConversationGroup(1, lambda: (time.sleep(delay), [asking(1, result=delay)])[1])

    list(answer_ahead(CountingEngine(), [group(0.2), group(0)], 1, 1, on_wait=waits.append))
    assert 0.15 < sum(waits) < PATIENCE


def test_an_error_of_a_job_ends_everything():
    engine = CountingEngine()

    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(
            answer_ahead(engine, [ConversationGroup(1, lambda: [asking(9, result=0)]), ConversationGroup(1, broken)], 2)
        )
    assert all(generation.done for generation in engine.steps_left)


def test_leaving_early_cancels_the_rest():
    engine = CountingEngine()
    results = answer_ahead(engine, [ConversationGroup(2, lambda: [asking(1, result=0), asking(9, result=1)])], 2)
    assert next(results) == 0
    results.close()
    assert [generation.finish_reason for generation in engine.steps_left] == ["cancelled"]
