"""Memory is counted before it is needed, and too little of it is one line with the smallest change that fits."""

import dataclasses

import jax
import pytest

import vl3_jax as vl3
from support.checkpoints import write_small_checkpoint
from vl3_jax import host_memory
from vl3_jax.checkpoint import load, loading, open_source
from vl3_jax.errors import InputError
from vl3_jax.inference import memory
from vl3_jax.inference.memory import Demand, ModelMemory, memory_plan

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(write_small_checkpoint(tmp_path_factory.mktemp("memory") / "small"))


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_that_are_loaded(source, dtype, quantize):
    plan = memory_plan(source, Demand(dtype, quantize))
    params = load(source, dtype=dtype, quantize=quantize, serving=True).params
    assert plan.weights == sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_the_smallest_change_that_fits_is_named(source, monkeypatch):
    many, short = Demand("float32", slots=16_384, patches=32_768), Demand("float32", rows=2, slots=512, patches=16)
    long = dataclasses.replace(short, slots=16_384)
    cases = [
        ("--max-visual-tokens 4096", many, dataclasses.replace(many, slots=12_288, patches=16_384)),
        ("1 rows at a time", short, dataclasses.replace(short, rows=1)),
        ("--kv-cache int8", dataclasses.replace(long, rows=1), dataclasses.replace(long, rows=1, kv_cache="int8")),
        ("--dtype bfloat16", dataclasses.replace(short, rows=1), dataclasses.replace(short, rows=1, dtype="bfloat16")),
    ]
    for change, demand, enough in cases:
        total = memory_plan(source, enough).total
        monkeypatch.setattr(memory, "free_memory", lambda total=total: total)
        with pytest.raises(InputError, match=rf"needs .* of memory .* are free; use {change}") as refused:
            ModelMemory(source, demand).check_loading()
        assert "\n" not in str(refused.value)
        assert source.location in str(refused.value)
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    with pytest.raises(InputError, match=r"the least is .*: use a smaller model or more memory"):
        ModelMemory(source, many).check_loading()
    monkeypatch.setattr(memory, "free_memory", lambda: None)
    ModelMemory(source, many).check_loading()  # a device that does not tell


def test_a_model_that_does_not_fit_is_not_loaded(source, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 10_000)
    monkeypatch.setattr(loading, "_load_leaf", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=r"needs .* of memory"):
        vl3.load(source.files)


@pytest.mark.parametrize(
    "error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")]
)
def test_an_exhausted_allocator_is_one_line(source, monkeypatch, error):
    def fail(*_):
        raise error

    model = vl3.load(source.files)
    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "_decode", fail)
        with pytest.raises(InputError, match=r"needs .* of memory"):
            model.chat("What?", max_new_tokens=2)
    assert isinstance(model.chat("What?", max_new_tokens=2), str)  # the engine is as good as before
    monkeypatch.setattr(loading, "_load_leaf", fail)
    with pytest.raises(InputError, match=r"needs .* of memory"):
        vl3.load(source.files)


def test_a_long_question_is_refused_before_it_is_read(source, monkeypatch):
    model = vl3.load(source.files)
    monkeypatch.setattr(memory, "free_memory", lambda: 100_000)
    with pytest.raises(InputError, match=r"x 1,\d+ tokens .* are free"):
        model.chat("What?", max_new_tokens=1000)


def test_limits_of_containers_count(tmp_path, monkeypatch):
    """The smallest of what the machine, the container and the groups around it have left."""
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:   8000 kB\n")
    (tmp_path / "cgroup").write_text("4:memory:/a/b\n0::/a\n")
    files = {
        "memory/a/b/memory.limit_in_bytes": "7000000",
        "memory/a/b/memory.usage_in_bytes": "4000000",
        "memory/a/b/memory.stat": "total_inactive_file 1000000\n",
        "memory/a/memory.limit_in_bytes": "9000000",
        "memory/a/memory.usage_in_bytes": "4000000",
        "memory/a/memory.stat": "",
        "a/memory.max": "max",
        "a/memory.current": "4000000",
    }
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "_OWN_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(host_memory, "_GROUPS", tmp_path / "groups")
    assert host_memory.free_host_memory() == 4_000_000
    (tmp_path / "groups" / "a" / "memory.max").write_text("4500000")
    (tmp_path / "groups" / "a" / "memory.stat").write_text("anon 5\ninactive_file 10\n")
    assert host_memory.free_host_memory() == 500_010
    for name in ("meminfo", "cgroup"):
        (tmp_path / name).unlink()
    assert host_memory.free_host_memory() is None
