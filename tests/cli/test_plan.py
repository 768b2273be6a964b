"""`vl3 plan`: with the TPU compiler, without a TPU."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from vl3_jax.cli.main import main
from vl3_jax.training import planning

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[plan]'"
)


def plan(config, topology, *flags):
    """In a process of its own: this one's devices are its own affair."""
    command = [sys.executable, "-m", "vl3_jax.cli.main", "plan", "--config", f"{CONFIGS / config}", "--json"]
    command += ["--topology", topology, *flags]
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-2000:]
    return done.returncode, json.loads(done.stdout)


@needs_compiler
def test_a_plan_is_the_compilers():
    code, found = plan("stage4_2b.py:mock", "v5litepod-8")
    assert (code, found["fits"], found["topology"], found["rows"]) == (0, True, "v5e:2x4", 8)
    memory = found["hbm_bytes_per_chip"]
    assert 0 < memory["arguments"] < memory["peak"] < memory["limit"] == int(15.75 * 2**30)
    assert found["tokens_per_step"] == 8 * 512
    assert found["flops_per_chip"] > 0
    assert found["collectives"]["all-gather"]["count"] > 2
    assert found["compile_seconds"] > 0


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("config", "topology"), [("stage4_2b.py", "v5e-16"), ("stage4_7b.py", "v5e-64")])
def test_stage_four_fits(config, topology):
    """40,960 patches and 16,384 tokens a row, one row a chip."""
    code, found = plan(config, topology)
    memory = found["hbm_bytes_per_chip"]
    print(
        f"{config} on {topology}: {memory['peak'] / 2**30:.2f} GiB a chip, compiled in {found['compile_seconds']:.0f} s"
    )
    assert (code, found["fits"]) == (0, True)
    assert memory["peak"] < 0.85 * memory["limit"]


def test_what_does_not_fit_says_by_how_much():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm. Exceeded by 2.75G"
    assert planning.bytes_needed(message) == int(18.5 * 2**30)
    assert planning.bytes_needed("something else") is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config", "nowhere.py", "--topology", "v5e:2x2"], "nowhere.py: no such configuration"),
        (["--config", f"{CONFIGS}/stage4_2b.py", "--topology", "v7:2x2"], "topology 'v7:2x2'"),
        (["--config", f"{CONFIGS}/stage4_2b.py", "--topology", "v5e:2x2", "--mfu", "2"], "--mfu 2.0"),
    ],
)
def test_mistakes_are_one_line(flags, message, capsys):
    assert main(["plan", *flags]) == 2
    assert message in capsys.readouterr().err
