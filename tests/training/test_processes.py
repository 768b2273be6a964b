"""Two processes as one job, killed and resumed; and writers of checkpoints killed at random moments."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chaos import BucketFiles, LocalFiles, Supervisor
from etils import epath
from runs import free_port, params, reports, run, start
from tiny import optimizer_for, start_params

from vl3_jax.storage.locks import LOCK, hold
from vl3_jax.training.checkpoints import Checkpoints
from vl3_jax.training.loop import PreemptionHandler
from vl3_jax.training.run_config import CheckpointConfig
from vl3_jax.training.state import new_state

SETTINGS = ("mesh.fsdp=8", "checkpoint.every=4", "steps=20")
PATIENCE = 400  # seconds


def pair(workdir, *changes):
    """Starts both processes of a job, with four devices each."""
    port = free_port()
    ranks = [["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-id", str(i)] for i in (0, 1)]
    return [
        start("stage3:2b", workdir, *SETTINGS, *changes, devices=4, flags=rank, stderr=subprocess.DEVNULL)
        for rank in ranks
    ]


def finish(processes):
    """Returns the exit codes of the processes."""
    return [process.wait(PATIENCE) for process in processes]


@pytest.mark.slow
def test_a_job_with_a_killed_process_ends_with_the_same_weights(tmp_path):
    assert finish(pair(tmp_path / "whole")) == [0, 0]
    processes = pair(tmp_path / "killed")
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "killed" / "checkpoints" / "8").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGKILL)
    processes[1].wait()
    time.sleep(1)
    processes[0].kill()
    processes[0].wait()
    assert max(int(step.name) for step in (tmp_path / "killed" / "checkpoints").iterdir() if step.name.isdigit()) < 20
    assert finish(pair(tmp_path / "killed")) == [0, 0]
    whole, resumed = params(tmp_path / "whole", 20), params(tmp_path / "killed", 20)
    for path, value in whole.items():
        np.testing.assert_array_equal(resumed[path], value, err_msg=path)
    last = [[line for line in reports(tmp_path / name) if line["step"] == 20][-1] for name in ("whole", "killed")]
    assert last[0]["loss"] == last[1]["loss"]


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_after_the_same_step(tmp_path):
    processes = pair(tmp_path / "run", "steps=400")
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "run" / "checkpoints" / "4").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)
    assert finish(processes) == [0, 0]
    steps = [int(step.name) for step in (tmp_path / "run" / "checkpoints").iterdir()]
    assert 4 < max(steps) < 400
    assert reports(tmp_path / "run")[-1]["step"] == max(steps)


@pytest.mark.slow
def test_two_processes_ask_a_benchmark_together(tmp_path):
    """Each asks a part of the questions on its own devices; the scores are those of one process."""
    asked = ("eval.tasks=nano/when,nano/digit", "eval.questions=3", "steps=2")
    one = start("stage3:2b", tmp_path / "one", *SETTINGS, *asked, devices=8, stderr=subprocess.DEVNULL)
    assert finish([one, *pair(tmp_path / "two", *asked)]) == [0, 0, 0]
    scores = [
        {key: value for line in reports(tmp_path / name) for key, value in line.items() if key.startswith("eval/")}
        for name in ("one", "two")
    ]
    assert list(scores[0]) == ["eval/nano/when", "eval/nano/digit"]
    assert scores[1] == scores[0]


@pytest.fixture
def supervisor(tmp_path, fast_compile, request):
    """Makes supervisors of small jobs of two processes, whose processes end with the test."""

    def make(workdir, files, name, *changes):
        made = Supervisor(workdir, files, tmp_path / name, *changes)
        request.addfinalizer(made.kill)
        return made

    return make


@pytest.mark.slow
def test_a_second_job_of_two_processes_is_refused_and_a_killed_process_ends_the_other(tmp_path, supervisor):
    workdir = tmp_path / "run"
    first, second = (supervisor(workdir, LocalFiles(workdir), name, "steps=4000") for name in ("first", "second"))
    processes = first.start()
    first.wait_for(lambda: first.last_step() > 0, processes)
    assert finish(second.start()) == [2, 2]
    assert second.said().count(f"{workdir}: process {processes[0].pid} on host ") == 2
    processes[1].kill()
    started = time.monotonic()
    assert processes[0].wait(PATIENCE) == 1
    assert time.monotonic() - started < 50  # as the documentation says
    assert first.said().count("process 0: another one of this job is gone (") == 1


@pytest.mark.slow
def test_two_processes_take_a_stale_lock_over(gcs, supervisor):
    gcs.buckets["stale"] = {}
    holder = {"host": "gone", "machine": "another", "pid": 1, "since": "yesterday"}
    gcs.put("stale", f"run/{LOCK}", json.dumps(holder).encode())
    job = supervisor("gs://stale/run", BucketFiles(gcs, "stale", "run"), "said", "steps=2")
    job.run()
    assert "process 1 on host gone, since yesterday, gave no sign of life; taking over" in job.said(200)
    assert f"run/{LOCK}" not in gcs.buckets["stale"]
    assert job.steps() == [2]


@pytest.mark.slow
def test_ctrl_c_during_a_save_loses_nothing(tmp_path, fast_compile):
    workdir = tmp_path / "run"
    process = start("stage3:2b", workdir, "steps=4000", "checkpoint.every=1", stderr=subprocess.DEVNULL)
    while not list(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 0
    last = reports(workdir)[-1]["step"] if (workdir / "metrics.jsonl").read_text() else 0
    assert max(int(step.name) for step in (workdir / "checkpoints").iterdir()) >= max(last, 1)


def test_a_second_job_is_refused(tmp_path, capsys):
    with hold(tmp_path / "run"):
        assert run("stage3:2b", tmp_path / "run") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"vl3 train: {tmp_path}/run: process {os.getpid()} on host ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_stops_after_the_step(number):
    with PreemptionHandler() as preemption:
        assert not preemption.should_stop(1)
        os.kill(os.getpid(), number)
        assert preemption.should_stop(2)
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)


def test_sighup_is_ignored_below_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with PreemptionHandler() as preemption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not preemption.should_stop(1)
    finally:
        signal.signal(signal.SIGHUP, before)


WRITER = """
import itertools, sys
import jax
from etils import epath
sys.path.insert(0, sys.argv[2])
from tiny import optimizer_for, start_params
from vl3_jax.training.checkpoints import Checkpoints
from vl3_jax.training.run_config import CheckpointConfig
from vl3_jax.training.state import new_state

optimizer = optimizer_for()
state = new_state(optimizer, jax.tree.map(jax.numpy.asarray, start_params()))
checkpoints = Checkpoints(epath.Path(sys.argv[1]), optimizer, CheckpointConfig(every=1, keep=2), has_adapters=False)
first = checkpoints.latest() + 1
print("ready", flush=True)
for step in itertools.count(first):
    marked = jax.tree.map(lambda leaf: jax.numpy.full_like(leaf, step), state)
    checkpoints.save(step, marked, {"step": step})
"""


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_the_last_complete_checkpoint_loads_whenever_writing_is_killed(times, tmp_path):
    rng = random.Random(times)
    optimizer = optimizer_for()
    state = new_state(optimizer, jax.tree.map(jnp.asarray, start_params()))
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    folder = str(pathlib.Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(folder).parent), "XLA_FLAGS": ""}
    for _ in range(times):
        command = [sys.executable, "-c", WRITER, str(tmp_path), folder]
        writer = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.0, 1.5))
        writer.kill()
        writer.wait()
        steps = [int(step.name) for step in (tmp_path / "checkpoints").iterdir() if step.name.isdigit()]
        if not steps:
            continue  # killed before the first was complete
        newest = max(steps)
        checkpoints = Checkpoints(
            epath.Path(tmp_path), optimizer, CheckpointConfig(every=1, keep=2), has_adapters=False
        )
        assert checkpoints.latest() == newest
        found = checkpoints.restore(state)
        assert all((leaf == newest).all() for leaf in jax.tree.leaves(found.state))
        assert (found.step, found.data_state) == (newest, {"step": newest})
        checkpoints.close()
    assert steps
