"""Plans are made once and then read from the cache."""

import pytest

from planning.fake_plans import FakePlanner
from planning.test_search import V5E, config
from vl3_jax.errors import InputError
from vl3_jax.parallel.topologies import parse_topology
from vl3_jax.planning import plan_cache


def test_a_plan_is_made_once(tmp_path, monkeypatch):
    planner = FakePlanner(16, 2)
    monkeypatch.setattr(plan_cache, "plan_step", planner)
    path = tmp_path / "plans.jsonl"
    first = plan_cache.PlanCache(path)(config(), V5E)
    assert plan_cache.PlanCache(path)(config(), V5E) == first
    assert len(planner.plans) == 1
    again = plan_cache.PlanCache(path)
    for other, topology in [
        (config("remat.text=dots"), V5E),
        (config(), parse_topology("v5e:4x8")),
        (config("mesh.data=2"), parse_topology("v5e:2x4", 2)),
    ]:
        assert again(other, topology) != first
    assert len(planner.plans) == 4
    monkeypatch.setattr(plan_cache, "_code_and_compiler", lambda: "changed")
    plan_cache.PlanCache(path)(config(), V5E)
    assert len(planner.plans) == 5


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "plans.jsonl"
    path.write_text('{"key": "a", "plan": {}}\nhello\n')
    with pytest.raises(InputError, match=r"plans.jsonl, line 2: not a record"):
        plan_cache.PlanCache(path)
