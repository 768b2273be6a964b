"""Tests the checks before a job starts: an error on one host ends all hosts with the same message."""

import os
import socket
import subprocess
import sys

import jax
import pytest
from launched_scripts import launched

from vl3_jax.errors import InputError
from vl3_jax.training import preflight, run_config

CONFIG = "stage3:2b,mock"

# One of two processes; the check fails on the second.
HOST = """
import sys
import jax
from vl3_jax.errors import InputError
from vl3_jax.training.all_hosts import run_on_all_hosts
rank = int(sys.argv[1])
jax.distributed.initialize(sys.argv[2], 2, rank)
def check():
    if rank:
        raise InputError("no such bucket")
run_on_all_hosts(lambda: None)
try:
    run_on_all_hosts(check)
except InputError as error:
    print("failed:", error)
"""


def config(*changes):
    return run_config.load(CONFIG, changes)


def test_the_number_of_devices_is_checked(tmp_path):
    preflight.check(config(), tmp_path)
    preflight.check(config(f"expect_devices={jax.device_count()}"), tmp_path)
    with pytest.raises(InputError, match=r"8 devices \(cpu\) where 64 are expected; .* have 8; check the slice"):
        preflight.check(config("expect_devices=64"), tmp_path)


def test_a_writable_workdir_is_left_unchanged(tmp_path):
    preflight.check(config(), tmp_path)
    preflight.check(config(), tmp_path / "new" / "run")
    assert not list(tmp_path.iterdir())


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"run: cannot be written .*; give another --workdir"):
        preflight.check(config(), tmp_path / "file" / "run")


def test_all_hosts_receive_the_error_of_one():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": ""}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(rank), address], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    for host in hosts:
        out = host.communicate(timeout=300)[0]
        assert f"failed: host 1 ({socket.gethostname()}): no such bucket" in out


@pytest.mark.slow
def test_a_job_of_two_hosts_ends_if_the_slice_is_too_small(tmp_path):
    flags = ("--processes", "2", "--cpu-devices", "2", "--restarts", "3")
    job = ("--config", CONFIG, "--workdir", str(tmp_path / "run"), "--config.expect_devices=8")
    result = launched("local.py", *flags, "--", *job)
    assert result.returncode == 2, result.stdout
    assert "4 devices (cpu) where 8 are expected; hosts 0 to 1 have 2, 2" in result.stdout
