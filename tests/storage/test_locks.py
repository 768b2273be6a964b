"""One writer a folder: who is refused, what a killed holder leaves, and who takes over."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from vl3_jax.errors import InputError
from vl3_jax.storage import locks
from vl3_jax.storage.locks import LOCK, hold

HOLDER = """
import sys, time
from vl3_jax.storage import locks
locks.HEARTBEAT = 0.2
with locks.hold(sys.argv[1]) as lock:
    print("held", flush=True)
    sys.stdin.readline()
    lock.check()
    print("still held", flush=True)
"""


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.2)
    monkeypatch.setattr(locks, "STALE", 1.5)
    monkeypatch.setattr(locks, "_POLL", 0.1)


@pytest.fixture
def holder(request):
    """Starts a process that holds the lock of a folder."""

    def start(folder):
        words = [sys.executable, "-c", HOLDER, str(folder)]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen(words, **streams, text=True)
        request.addfinalizer(process.kill)
        assert process.stdout.readline() == "held\n"
        return process

    return start


def test_a_local_folder_has_one_writer_and_a_killed_one_leaves_nothing(tmp_path, holder):
    first = holder(tmp_path / "run")
    with pytest.raises(InputError, match=rf"run: process {first.pid} on host .*, since 20.* is writing it; wait"):
        hold(tmp_path / "run").__enter__()
    first.kill()
    first.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with hold(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / LOCK).exists()
    with hold(tmp_path / "new"), hold(tmp_path / "new", ".other"):
        pass
    assert not (tmp_path / "new").exists()


def test_waiting_for_another_holder(tmp_path):
    done = threading.Event()

    def second():
        with hold(tmp_path / "parts", wait=True):
            done.set()

    with hold(tmp_path / "parts"):
        thread = threading.Thread(target=second)
        thread.start()
        assert not done.wait(0.3)
    thread.join(60)
    assert done.is_set()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(locks.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with hold(tmp_path):
        assert "has no locks (No locks available), so nothing keeps a second job away" in caplog.text


def test_a_bucket_folder_has_one_writer(gcs, impatient):
    gcs.buckets["locks"] = {}
    with hold("gs://locks/run") as lock:
        before = gcs.buckets["locks"][f"run/{LOCK}"].generation
        with pytest.raises(InputError, match=rf"gs://locks/run: process {os.getpid()} on host .* is writing it"):
            hold("gs://locks/run").__enter__()
        assert gcs.buckets["locks"][f"run/{LOCK}"].generation > before
        lock.check()
    assert not gcs.buckets["locks"]


def test_a_killed_process_of_this_machine_is_taken_over_at_once(gcs, holder, caplog):
    gcs.buckets["killed"] = {}
    first = holder("gs://killed/run")
    first.kill()
    first.wait()
    started = time.monotonic()
    with hold("gs://killed/run"):
        assert time.monotonic() - started < locks.STALE / 2
    assert f"process {first.pid} on host" in caplog.text


def test_a_holder_that_wakes_up_after_a_takeover_ends_before_it_writes(gcs, holder, impatient):
    gcs.buckets["stale"] = {}
    first = holder("gs://stale/run")
    first.send_signal(signal.SIGSTOP)
    with hold("gs://stale/run") as lock:
        first.send_signal(signal.SIGCONT)
        out, error = first.communicate("\n", timeout=120)
        assert (first.returncode, out) == (2, "")
        assert error.startswith(f"gs://stale/run: process {os.getpid()} on host ")
        assert error.endswith("has taken over since; this one ends\n")
        assert error.count("\n") == 1
        lock.check()
