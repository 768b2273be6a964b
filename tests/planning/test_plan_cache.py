"""Programs are compiled once and then read from the cache."""

import pytest

from planning.test_search import V5E, config
from vl3_jax.errors import InputError
from vl3_jax.parallel.topologies import parse_topology
from vl3_jax.planning import plan_cache
from vl3_jax.planning.compiler import ProgramAnalysis
from vl3_jax.planning.program_cost import ProgramCost, Traffic


@pytest.fixture
def compiled(monkeypatch):
    """Replaces the planner by one that asks for the programs of two lengths; returns the lengths that it compiled."""
    lengths = []

    def plan_step(config, topology, hlo, analyze):
        def compile_step():
            lengths.append(length)
            cost = ProgramCost({"rest": len(lengths)}, {"all-gather": Traffic(1, 2)}, 3, 4, 5)
            return ProgramAnalysis(True, 1, 2, 3, cost, 0.5)

        found = []
        for length in (*config.data.shorter_lengths, config.data.length):
            found.append(analyze(length, compile_step))
        return found

    monkeypatch.setattr(plan_cache, "plan_step", plan_step)
    return lengths


def test_a_program_is_compiled_once(tmp_path, monkeypatch, compiled):
    path, both = tmp_path / "plans.jsonl", config("data.shorter_lengths=(8,)", "data.length=16")
    first = plan_cache.PlanCache(path)(both, V5E)
    assert plan_cache.PlanCache(path)(both, V5E) == first
    assert plan_cache.PlanCache(path)(config("data.shorter_lengths=()", "data.length=16"), V5E) == first[1:]
    assert compiled == [8, 16]
    again, longest = plan_cache.PlanCache(path), config("data.shorter_lengths=()", "data.length=16")
    for other, topology in [
        (config("data.shorter_lengths=()", "data.length=16", "remat.text=dots"), V5E),
        (longest, parse_topology("v5e:4x8")),
        (longest, parse_topology("v5e:2x4", 2)),
    ]:
        assert again(other, topology) != first[1:]
    assert compiled == [8, 16, 16, 16, 16]
    monkeypatch.setattr(plan_cache, "_code_and_compiler", lambda: "changed")
    plan_cache.PlanCache(path)(longest, V5E)
    assert len(compiled) == 6


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "plans.jsonl"
    path.write_text('{"key": "a", "program": {}}\nhello\n')
    with pytest.raises(InputError, match=r"plans.jsonl, line 2: not a record"):
        plan_cache.PlanCache(path)
