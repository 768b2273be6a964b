"""The TPU library on a machine without a TPU: left alone, and silent."""

import os
import subprocess
import sys

import pytest

from support.compiler import needs_compiler
from vl3_jax import platforms

SETTINGS = ("JAX_PLATFORMS", *platforms._TPU_VARIABLES)


@pytest.fixture
def machine(monkeypatch):
    """Describes a machine to the module: its device files, its jax plugins, whether the TPU library is installed."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)

    def describe(files: str = "", plugins: tuple[str, ...] = (), library: bool = True) -> None:
        find = platforms.importlib.util.find_spec
        monkeypatch.setattr(
            platforms.importlib.util, "find_spec", lambda name: (library or None) if name == "libtpu" else find(name)
        )
        monkeypatch.setattr(platforms.glob, "glob", lambda pattern: [files] if files and files[:8] in pattern else [])
        monkeypatch.setattr(platforms, "_plugins", lambda: set(plugins))

    return describe


@pytest.mark.parametrize(
    ("file", "plugins", "expected"),
    [
        ("", (), "cpu"),
        ("", ("xla_cuda12",), "cpu"),
        ("/dev/nvidia0", (), "cpu"),
        ("/dev/nvidiactl", ("xla_cuda12", "jax_plugins.xla_cuda12"), "cuda,cpu"),
        ("/dev/dxg", ("xla_cuda13",), "cuda,cpu"),
        ("/dev/nvidia0", ("xla_cuda12", "other"), None),
    ],
)
def test_without_a_tpu_the_other_devices_are_named(machine, file, plugins, expected):
    machine(file, plugins)
    platforms.leave_out_absent_tpu()
    assert os.environ.get("JAX_PLATFORMS") == expected


@pytest.mark.parametrize("file", ["/dev/accel0", "/dev/vfio/0"])
def test_a_tpu_is_used(machine, file):
    machine(files=file)
    platforms.leave_out_absent_tpu()
    assert platforms.on_tpu_machine()
    assert "JAX_PLATFORMS" not in os.environ


def test_without_the_library_nothing_is_decided(machine):
    machine(library=False)
    platforms.leave_out_absent_tpu()
    assert "JAX_PLATFORMS" not in os.environ


@pytest.mark.parametrize("name", SETTINGS)
def test_the_environment_wins(machine, monkeypatch, name):
    machine()
    monkeypatch.setenv(name, "mine")
    platforms.leave_out_absent_tpu()
    assert os.environ.get("JAX_PLATFORMS", "mine") == "mine"


@needs_compiler
def test_a_command_prints_nothing_of_the_tpu_library(tmp_path):
    """A run that ends with one line of its own once it has looked at the devices."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "JAX_PLATFORMS"))}
    flags = ["--config", "stage1:2b,mock", "--workdir", str(tmp_path / "run"), "--config.expect_devices=99"]
    done = subprocess.run(
        [sys.executable, "-m", "vl3_jax", "train", *flags], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert len(done.stderr.splitlines()) == 1, done.stderr[-2000:]
    assert "99" in done.stderr
