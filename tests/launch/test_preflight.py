"""What a job asks before it begins: one host that finds fault ends all of them, with the same line."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest
from launched_scripts import launched

from vl3_jax import config_file
from vl3_jax.errors import InputError
from vl3_jax.training import preflight

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "stage3_2b.py"

# One of two processes; the second finds fault.
HOST = """
import sys
import jax
from vl3_jax.errors import InputError
from vl3_jax.training import preflight
rank = int(sys.argv[1])
jax.distributed.initialize(sys.argv[2], 2, rank)
def step():
    if rank:
        raise InputError("no such bucket")
preflight.run_on_all_hosts(lambda: None)
try:
    preflight.run_on_all_hosts(step)
except InputError as error:
    print("found", error)
"""


def config(*changes):
    return config_file.load(f"{CONFIG}:mock", changes)


def test_the_number_of_devices(tmp_path):
    preflight.check(config(), tmp_path)
    preflight.check(config(f"expect_devices={jax.device_count()}"), tmp_path)
    with pytest.raises(InputError, match=r"8 devices \(cpu\) where 64 are expected; .* have 8; check the slice"):
        preflight.check(config("expect_devices=64"), tmp_path)


def test_a_workdir_that_can_be_written_stays_as_it_was(tmp_path):
    preflight.check(config(), tmp_path)
    preflight.check(config(), tmp_path / "new" / "run")
    assert not list(tmp_path.iterdir())


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"run: cannot be written .*; give another --workdir"):
        preflight.check(config(), tmp_path / "file" / "run")


def test_all_hosts_hear_of_the_fault_of_one():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": ""}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, str(rank), address], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    for host in hosts:
        out = host.communicate(timeout=300)[0]
        assert f"found host 1 ({socket.gethostname()}): no such bucket" in out


@pytest.mark.slow
def test_a_job_of_two_hosts_ends_where_a_slice_is_too_small(tmp_path):
    flags = ("--processes", "2", "--cpu-devices", "2", "--restarts", "3")
    job = ("--config", f"{CONFIG}:mock", "--workdir", str(tmp_path / "run"), "--config.expect_devices=8")
    found = launched("local.py", *flags, "--", *job)
    assert found.returncode == 2, found.stdout
    assert "4 devices (cpu) where 8 are expected; hosts 0 to 1 have 2, 2" in found.stdout
