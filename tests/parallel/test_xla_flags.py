"""Tests the compiler flags by generation, and that the installed compilers accept them."""

import os
import subprocess
import sys

import pytest

from support.compiler import needs_compiler
from vl3_jax.errors import InputError
from vl3_jax.parallel import xla_flags
from vl3_jax.parallel.xla_flags import GENERATIONS, GPU, environment

TOPOLOGIES = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4"}
COMPILE = """
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

devices = topologies.get_topology_desc(sys.argv[1], platform="tpu").devices
mesh = jax.sharding.Mesh(np.array(devices), ("fsdp",))
split = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P("fsdp")))
jax.jit(lambda a, b: jnp.tanh(a @ b).sum()).lower(split, split).compile()
"""


def compile_with_flags(generation: str, flags: str) -> subprocess.CompletedProcess:
    off_the_cloud = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    variables = os.environ | off_the_cloud | {"LIBTPU_INIT_ARGS": flags, "XLA_FLAGS": ""}
    command = [sys.executable, "-c", COMPILE, TOPOLOGIES[generation]]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


@needs_compiler
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_the_compiler_accepts_all_flags(generation):
    (flags,) = environment(generation, slices=2, existing={}).values()
    result = compile_with_flags(generation, flags)
    assert result.returncode == 0, result.stderr[-1000:]


@needs_compiler
def test_the_compiler_refuses_an_unknown_flag():
    result = compile_with_flags("v5e", "--xla_tpu_no_such_flag=true")
    assert result.returncode != 0
    assert "xla_tpu_no_such_flag" in result.stderr


@pytest.mark.parametrize(("extra", "code"), [("", 0), (" --xla_gpu_no_such_flag=true", 1)])
def test_jaxlib_accepts_the_gpu_flags(extra, code):
    flags = environment(GPU, existing={})["XLA_FLAGS"] + extra
    variables = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert bool(result.returncode) == bool(code), result.stderr[-1000:]


def test_existing_flags_come_last():
    variables = environment("v5e", existing={"LIBTPU_INIT_ARGS": "--mine=1  --xla_enable_async_all_gather=false"})
    flags = variables["LIBTPU_INIT_ARGS"].split()
    assert flags[-2:] == ["--mine=1", "--xla_enable_async_all_gather=false"]
    assert flags.count("--xla_tpu_enable_async_collective_fusion=true") == 1


def test_only_v5e_fuses_collectives():
    for generation in GENERATIONS:
        assert ("collective_fusion" in str(environment(generation, existing={}))) == (generation == "v5e")


def test_several_slices_have_additional_flags():
    for generation in GENERATIONS:
        (one_slice,), (two_slices,) = (environment(generation, slices, {}).values() for slices in (1, 2))
        assert ("data_parallel" in two_slices) == (generation != GPU)
        assert "data_parallel" not in one_slice


def test_the_command(capsys, monkeypatch):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    assert xla_flags.main(["v6e", "--slices", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("LIBTPU_INIT_ARGS=--xla_")
    assert "--xla_tpu_scoped_vmem_limit_kib=98304 " in printed
    assert printed.count("\n") == 1
    assert xla_flags.main(["v9"]) == 2
    assert capsys.readouterr().err == "xla_flags: unknown generation 'v9': give one of v5e, v5p, v6e, gpu\n"
    with pytest.raises(InputError, match="v9"):
        environment("v9")
