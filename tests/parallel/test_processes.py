"""Joining the processes of a job: what is asked for, from where."""

import jax
import pytest

from vl3_jax.errors import InputError
from vl3_jax.parallel import processes


@pytest.fixture
def joined(monkeypatch):
    """Calls of `jax.distributed.initialize`, none of which happens."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: calls.append(arguments))
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", *processes._CLUSTERS):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_alone(joined):
    processes.start()
    assert joined == []


def test_flags_win_over_the_environment(joined, monkeypatch):
    processes.start("host:1", 2, 0)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:2")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    processes.start()
    processes.start("host:3", 5, 4)
    assert joined == [("host:1", 2, 0), ("host:2", 4, 3), ("host:3", 5, 4)]


@pytest.mark.parametrize("name", processes._CLUSTERS)
def test_known_clusters_need_nothing(joined, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    processes.start()
    assert joined == [()]


def test_tpu_machines_need_nothing(joined, monkeypatch):
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    processes.start()
    assert joined == [()]


@pytest.mark.parametrize("arguments", [("host:1", 2, 2), ("host:1", 2, None), ("host:1", None, 0), (None, 2, 0)])
def test_what_does_not_go_together(joined, arguments):
    with pytest.raises(InputError, match="--process"):
        processes.start(*arguments)
    assert joined == []


def test_numbers_in_the_environment(joined, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES is 'two'"):
        processes.start("host:1", None, 0)
