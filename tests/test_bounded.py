"""The harness of fuzz tests tells results, refusals, errors, hangs, memory and crashes apart."""

import functools
import importlib
import os
import signal
import sys
import time

import pytest

from support.bounded import run_bounded
from vl3_jax.errors import InputError

MEMORY = 2**28


def act(offset: int, action: str | int) -> int | None:
    match action:
        case "refuse":
            raise InputError("no such file")
        case "two lines":
            raise InputError("no\nfile")
        case "fail":
            raise ValueError("a bug")
        case "sleep":
            time.sleep(60)
        case "spin":
            while True:
                pass
        case "fill":
            return len(bytearray(os.urandom(1024)) * 2**18)
        case "map":
            return len(bytearray(2**40))
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            sys.exit(3)
        case _:
            return action + offset


@pytest.mark.parametrize("workers", [1, 3])
def test_every_input_has_an_outcome(workers):
    actions = {
        **{n: ("result", n + 10, True) for n in range(20)},
        "refuse": ("refused", "no such file", True),
        "two lines": ("refused", "no\nfile", False),
        "fail": ("error", "ValueError: a bug", False),
        "sleep": ("hang", "0.4 s", False),
        "spin": ("hang", "0.4 s", False),
        "fill": ("memory", "256", False),
        "map": ("memory", "MemoryError", False),
        "crash": ("died", "SIGSEGV", False),
        "exit": ("died", "3", False),
    }
    items = [*actions, 99, "refuse"]
    outcomes = run_bounded(functools.partial(act, 10), items, workers=workers, seconds=0.4, memory=MEMORY)
    assert [outcome.item for outcome in outcomes] == items
    for outcome in outcomes[: len(actions)]:
        kind, value, harmless = actions[outcome.item]
        assert (outcome.kind, outcome.harmless) == (kind, harmless), str(outcome)
        assert value == outcome.value if kind == "result" else value in outcome.value
    assert [outcome.value for outcome in outcomes[-2:]] == [109, "no such file"]


def test_workers_know_nothing_of_jax():
    importlib.import_module("jax")
    assert run_bounded(functools.partial(imported), ["jax"])[0].value is False


def imported(name: str) -> bool:
    return name in sys.modules
