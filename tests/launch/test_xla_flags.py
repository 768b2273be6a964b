"""Tests that the compiler flags pass from every script to the training process."""

import pytest
from launched_scripts import launched

from vl3_jax.parallel.xla_flags import environment

JOB = ("--", "--config", "c.py", "--workdir", "gs://bucket/run")
SLICE = ("--name", "s4", "--zone", "us-west4-a", "--topology", "v5litepod-64")


@pytest.mark.parametrize(
    ("script", "arguments", "passed"),
    [
        ("tpu_vm.sh", ("run", *SLICE, "--dry-run", "--xla-flags", "--node-count", "2", *JOB), r"v5e\ --slices\ 2"),
        ("slurm.sh", ("--dry-run", "--xla-flags", *JOB), "--xla-flags -- --config"),
        ("slurm.sh", ("--inside", "--dry-run", "--xla-flags", *JOB), "--xla-flags=gpu -- --config"),
    ],
)
def test_scripts_pass_the_flags_on(script, arguments, passed):
    result = launched(script, *arguments)
    assert result.returncode == 0, result.stderr
    assert passed in result.stdout
    without = launched(script, *(word for word in arguments if word != "--xla-flags"))
    assert "xla-flags" not in without.stdout


def test_a_manifest_passes_the_flags_on():
    flags = ("--name", "s4", "--image", "i", "--config", "c.py", "--workdir", "gs://b/r", "--topology", "v6e:8x8")
    result = launched("gke/render.py", *flags, "--slices", "2", "--xla-flags")
    assert result.returncode == 0, result.stderr
    words = result.stdout.replace("'", "").split()
    start = words.index("--xla-flags", words.index("args:"))
    assert [word for word in words[start : start + 7] if word != "-"] == ["--xla-flags", "v6e", "--slices", "2"]


def test_a_process_receives_the_flags():
    (flags,) = environment("v5e", 2, {}).values()
    arguments = ("--xla-flags", "v5e", "--slices", "2", "--dry-run", "--", "--workdir", "x")
    result = launched("local.py", *arguments, LIBTPU_INIT_ARGS="")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"LIBTPU_INIT_ARGS='{flags}' ")
    bad = launched("local.py", "--xla-flags", "v9", "--", "--workdir", "x")
    assert bad.returncode == 2
    assert "generation 'v9'" in bad.stderr
