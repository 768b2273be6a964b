"""Plans that are not made twice."""

import pytest

from planning.made_up import MadeUp
from planning.test_search import V5E, config
from vl3_jax.errors import InputError
from vl3_jax.parallel.topologies import topology
from vl3_jax.planning import record


def test_a_plan_is_made_once(tmp_path, monkeypatch):
    planner = MadeUp(16, 2)
    monkeypatch.setattr(record, "plan_step", planner)
    path = tmp_path / "plans.jsonl"
    first = record.Record(path)(config(), V5E)
    assert record.Record(path)(config(), V5E) == first
    assert len(planner.asked) == 1
    again = record.Record(path)
    for other, slice_ in [
        (config("remat.text=dots"), V5E),
        (config(), topology("v5e:4x8")),
        (config("mesh.data=2"), topology("v5e:2x4", 2)),
    ]:
        assert again(other, slice_) != first
    assert len(planner.asked) == 4
    monkeypatch.setattr(record, "_program", lambda: "changed")
    record.Record(path)(config(), V5E)
    assert len(planner.asked) == 5


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "plans.jsonl"
    path.write_text('{"key": "a", "plan": {}}\nhello\n')
    with pytest.raises(InputError, match=r"plans.jsonl, line 2: not a record"):
        record.Record(path)
