"""Tests the local launcher: its commands, supervision of failing processes, and a real job with a killed process."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from launched_scripts import LAUNCH, ROOT, launched

from vl3_jax.checkpoint import load
from vl3_jax.training.groups import flatten

TIMEOUT = 600  # seconds

# A fake `vl3`: its --config lists what it does in each attempt.
FAKE = """
import os, pathlib, signal, sys, time
rank = int(sys.argv[sys.argv.index("--process-id") + 1]) if "--process-id" in sys.argv else 0
plan = sys.argv[sys.argv.index("--config") + 1].split(",")
workdir = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
count = workdir / f"attempts-{rank}"
attempt = len(count.read_text()) if count.exists() else 0
count.write_text("x" * (attempt + 1))
act = plan[min(attempt, len(plan) - 1)]
def stopped(*_):
    print("stopped after step 3 of 20; run the same command to resume", flush=True)
    sys.exit(0)
if act == "listen":
    signal.signal(signal.SIGTERM, stopped)
    print("ready", flush=True)
    time.sleep(60)
if act == "stop":
    stopped()
if act == "hang" or (act == "die" and rank == 0):
    time.sleep(60)
if act == "move":  # takes longer than --hang-seconds, but with progress
    for step in range(8):
        time.sleep(0.5)
        sys.stderr.write(f"\\r 10%|x  | {step}/8 [00:0{step}<00:01]")
sys.exit({"die": 1, "bad": 2}.get(act, 0))
"""


@pytest.fixture
def fake(tmp_path):
    (tmp_path / "vl3_jax" / "cli").mkdir(parents=True)
    (tmp_path / "vl3_jax" / "__init__.py").touch()
    (tmp_path / "vl3_jax" / "cli" / "__init__.py").touch()
    (tmp_path / "vl3_jax" / "cli" / "main.py").write_text(FAKE)
    return tmp_path


def start_job(folder, plan, *flags):
    command = [sys.executable, str(LAUNCH / "local.py"), *flags, "--", "--config", plan, "--workdir", str(folder)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def count_attempts(folder, rank=0):
    return len((folder / f"attempts-{rank}").read_text())


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        (
            ["--processes", "2", "--cpu-devices", "4", "--port", "1234"],
            [
                "JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 PYTHON -m vl3_jax.cli.main train "
                f"--config a.py:mock --workdir 'my run' --coordinator 127.0.0.1:1234 --processes 2 --process-id {rank}"
                for rank in (0, 1)
            ],
        ),
        (
            ["--processes", "2", "--gpus", "4"],
            [
                f"CUDA_VISIBLE_DEVICES={gpus} PYTHON -m vl3_jax.cli.main train --config a.py:mock --workdir 'my run' "
                f"--coordinator 127.0.0.1:PORT --processes 2 --process-id {rank}"
                for rank, gpus in ((0, "0,1"), (1, "2,3"))
            ],
        ),
        ([], ["PYTHON -m vl3_jax.cli.main train --config a.py:mock --workdir 'my run'"]),
    ],
)
def test_a_dry_run_prints_the_commands(flags, lines):
    job = ["--config", "a.py:mock", "--workdir", "my run"]
    result = launched("local.py", "--dry-run", *flags, "--", *job, XLA_FLAGS="")
    assert result.returncode == 0, result.stderr
    assert result.stdout.replace(shlex.quote(sys.executable), "PYTHON").splitlines() == lines


@pytest.mark.parametrize(
    "arguments",
    [[], ["--", "--config", "a.py"], ["--processes", "3", "--gpus", "8", "--", "--workdir", "x"]],
)
def test_bad_flags_are_refused(arguments):
    result = launched("local.py", *arguments)
    assert result.returncode == 2
    assert "error:" in result.stderr


def test_a_failed_job_is_restarted(fake):
    job = start_job(fake, "die,die,done", "--processes", "2", "--restarts", "2")
    out = job.communicate(timeout=TIMEOUT)[0]
    assert job.returncode == 0, out
    assert count_attempts(fake) == count_attempts(fake, 1) == 3
    assert "process 1: exit code 1; again from the last checkpoint, restart 1 of 2" in out


@pytest.mark.parametrize(("plan", "code", "count"), [("die", 1, 2), ("bad", 2, 1), ("stop", 75, 1), ("done", 0, 1)])
def test_exit_codes(fake, plan, code, count):
    job = start_job(fake, plan, "--processes", "1" if plan != "die" else "2", "--restarts", "1")
    out = job.communicate(timeout=TIMEOUT)[0]
    assert job.returncode == code, out
    assert count_attempts(fake) == count


def test_a_hanging_job_is_killed_and_a_slow_one_is_not(fake):
    job = start_job(fake, "hang,move", "--restarts", "1", "--hang-seconds", "2")
    out = job.communicate(timeout=TIMEOUT)[0]
    assert job.returncode == 0, out
    assert "no step was finished for 2 s" in out
    assert "process 0: killed by signal 9" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on(fake, number):
    job = start_job(fake, "listen", "--restarts", "5")
    while "ready" not in (line := job.stdout.readline()):
        assert line
    job.send_signal(number)
    out = job.communicate(timeout=TIMEOUT)[0]
    assert job.returncode == 75, out
    assert "[0] stopped after step 3 of 20" in out
    assert count_attempts(fake) == 1


def test_bad_input_of_a_real_job_ends_it(tmp_path):
    result = launched("local.py", "--restarts", "3", "--", "--config", "nothing.py", "--workdir", str(tmp_path))
    assert result.returncode == 2
    assert "[0] vl3 train: nothing.py: no such configuration" in result.stdout


def start_real_job(workdir):
    flags = ["--processes", "2", "--cpu-devices", "4", "--restarts", "1", "--hang-seconds", "300"]
    job = ["--config", "stage3:2b,mock", "--workdir", str(workdir), "--config.mesh.fsdp=8"]
    job += ["--config.checkpoint.every=4", "--config.expect_devices=8", "--config.log.tensorboard=False"]
    command = [sys.executable, str(LAUNCH / "local.py"), *flags, "--", *job]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def load_weights(workdir):
    tree = load(workdir / "checkpoints" / "20").params
    return {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}


@pytest.mark.slow
def test_a_real_job_with_a_killed_process_ends_with_the_same_weights(tmp_path):
    uninterrupted = start_real_job(tmp_path / "uninterrupted")
    out = uninterrupted.communicate(timeout=TIMEOUT)[0]
    assert uninterrupted.returncode == 0, out
    job = start_real_job(tmp_path / "killed")
    while not (match := re.match(r"\[launch\] attempt 1: processes \d+, (\d+)", line := job.stdout.readline())):
        assert line
    deadline = time.monotonic() + TIMEOUT
    while not (tmp_path / "killed" / "checkpoints" / "8").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(int(match[1]), signal.SIGKILL)
    out = job.communicate(timeout=TIMEOUT)[0]
    assert job.returncode == 0, out
    assert "process 1: killed by signal 9; again from the last checkpoint, restart 1 of 1" in out
    expected, actual = load_weights(tmp_path / "uninterrupted"), load_weights(tmp_path / "killed")
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)
