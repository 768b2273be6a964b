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

PATIENCE = 120  # seconds for whatever must happen, on a machine with other work too


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
import jax
from jax.experimental import multihost_utils
from vl3_jax.errors import InputError
from vl3_jax.parallel import processes
logging.basicConfig(level=logging.ERROR, format="%(message)s")
processes.LOST_SECONDS, processes._BEAT_SECONDS = float(sys.argv[4]), 0.5
processes.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
jax.devices()
print("connected", flush=True)
try:
    with processes.ended_together():
        if sys.argv[2] in sys.argv[3]:
            raise InputError("a full disk")
        multihost_utils.sync_global_devices("all") if sys.argv[3] else time.sleep(60)
except InputError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture
def start_job(request):
    """Starts both processes of a job, of which those in `failing` fail."""

    def start(failing, lost_seconds):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        command = [sys.executable, "-c", JOB, str(port)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        job = [subprocess.Popen([*command, rank, failing, str(lost_seconds)], **streams) for rank in ("0", "1")]
        for process in job:
            request.addfinalizer(process.kill)
        assert [process.stdout.readline() for process in job] == ["connected\n"] * 2
        return job

    return start


def test_a_killed_process_ends_the_others_with_a_line(start_job):
    job = start_job("", 2)
    time.sleep(1)  # both have been heard
    job[1].send_signal(signal.SIGKILL)
    assert job[0].wait(PATIENCE) == 1
    line = "process 0: another one of this job is gone (process 1 gave no sign of life for 2 s); run the same"
    error = job[0].stderr.read()
    assert error.startswith(line)
    assert error.count("\n") == 1


@pytest.mark.parametrize("failing", ["0", "1", "01"])
def test_a_process_that_fails_keeps_its_line_and_ends_the_others(start_job, failing):
    for rank, process in enumerate(start_job(failing, PATIENCE)):
        error = process.communicate(timeout=PATIENCE)[1]
        if str(rank) in failing:
            assert process.returncode == 2
            assert error == "a full disk\n" if failing == "01" else error == f"process {rank}: a full disk\n"
        else:
            line = f"process {rank}: another one of this job is gone (process {failing} failed); run the same command"
            assert process.returncode == 1
            assert error.startswith(line)
            assert error.count("\n") == 1
