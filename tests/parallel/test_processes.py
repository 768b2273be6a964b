"""Tests the arguments with which `jax.distributed` is initialised, and a job of which one process is killed."""

import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from vl3_jax.errors import InputError
from vl3_jax.parallel import processes


@pytest.fixture
def initialize_calls(monkeypatch):
    """Records the calls of `jax.distributed.initialize` instead of making them."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: calls.append(arguments))
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", *processes._CLUSTERS):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_a_single_process(initialize_calls):
    processes.initialize()
    assert initialize_calls == []


def test_arguments_override_the_environment(initialize_calls, monkeypatch):
    processes.initialize("host:1", 2, 0)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:2")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    processes.initialize()
    processes.initialize("host:3", 5, 4)
    assert initialize_calls == [("host:1", 2, 0), ("host:2", 4, 3), ("host:3", 5, 4)]


@pytest.mark.parametrize("name", processes._CLUSTERS)
def test_known_clusters_need_no_arguments(initialize_calls, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    processes.initialize()
    assert initialize_calls == [()]


def test_tpu_machines_need_no_arguments(initialize_calls, monkeypatch):
    monkeypatch.setattr(processes, "on_tpu_machine", lambda: True)
    processes.initialize()
    assert initialize_calls == [()]


@pytest.mark.parametrize("arguments", [("host:1", 2, 2), ("host:1", 2, None), ("host:1", None, 0), (None, 2, 0)])
def test_incomplete_settings_are_refused(initialize_calls, arguments):
    with pytest.raises(InputError, match="--process"):
        processes.initialize(*arguments)
    assert initialize_calls == []


def test_invalid_numbers_in_the_environment_are_refused(initialize_calls, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES is 'two'"):
        processes.initialize("host:1", None, 0)


JOB = """
import logging, sys, time
from vl3_jax.parallel import processes
logging.basicConfig(level=logging.ERROR, format="%(message)s")
processes.LOST_SECONDS, processes._BEAT_SECONDS = 2.0, 0.2
processes.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
print("connected", flush=True)
time.sleep(60)
"""


def test_a_killed_process_ends_the_others_with_a_line():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = [subprocess.Popen([sys.executable, "-c", JOB, str(port), str(rank)], **streams) for rank in (0, 1)]
    try:
        assert [process.stdout.readline() for process in job] == ["connected\n"] * 2
        time.sleep(1)  # both have been heard
        job[1].send_signal(signal.SIGKILL)
        assert job[0].wait(20) == 1
        line = "process 0: another one of this job is gone (process 1 gave no sign of life for 2 s); run the same"
        error = job[0].stderr.read()
        assert error.startswith(line)
        assert error.count("\n") == 1
    finally:
        for process in job:
            process.kill()
            process.communicate()
