"""The search over plans: candidates, those passed over, the best, and the change that makes a step fit."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planning.fake_plans import FakePlanner
from vl3_jax import config_tree
from vl3_jax.parallel.topologies import parse_topology
from vl3_jax.planning import report, search
from vl3_jax.training import run_config

V5E = parse_topology("v5e:4x4")


def config(*changes):
    return run_config.load("stage4:2b", changes)


@settings(max_examples=20, deadline=None)
@given(state=st.floats(0, 400), row=st.floats(0.1, 30))
def test_nothing_that_fits_is_passed_over(state, row):
    planner = FakePlanner(state, row)
    found = list(search.search(config(), V5E, planner))
    assert len(found) == len(search.candidates(V5E)) == len(planner.plans) + sum(plan is None for _, plan in found)
    for one, plan in found:
        if plan is None:
            assert not FakePlanner(state, row)(config_tree.replace(config(), one.settings(config())), V5E).fits


@settings(max_examples=20, deadline=None)
@given(state=st.floats(0, 100), row=st.floats(0.1, 10))
def test_the_best_are_those_that_nothing_beats(state, row):
    plans = [plan for _, plan in search.search(config(), V5E, FakePlanner(state, row)) if plan]
    best = search.pareto(plans)
    fitting = [plan for plan in plans if plan.fits]
    assert bool(best) == bool(fitting)
    for plan in fitting:
        beaten = [
            other
            for other in fitting
            if other.speed >= plan.speed
            and other.program.peak <= plan.program.peak
            and (other.speed, other.program.peak) != (plan.speed, plan.program.peak)
        ]
        assert not (plan in best and beaten)
        if not beaten:
            assert any((one.speed, one.program.peak) == (plan.speed, plan.program.peak) for one in best)


@pytest.mark.parametrize(("name", "slices", "count"), [("v5e:1x1", 1, 1), ("v5e:4x4", 1, 4), ("v5p:2x2x2", 4, 4)])
def test_meshes_cover_the_slices(name, slices, count):
    topology = parse_topology(name, slices)
    found = search.meshes(topology)
    assert len(found) == count
    for mesh in found:
        assert mesh["data"] * mesh["fsdp"] * mesh["tensor"] * mesh["context"] == topology.chips
        assert mesh["data"] % slices == 0


@pytest.mark.parametrize(
    ("state", "row", "changes", "expected"),
    [
        (16, 6, ["batch.rows=48", "batch.grad_accum_steps=1"], {"batch.grad_accum_steps": 3}),
        (16, 6, ["remat.text=none", "remat.vision=dots"], {"remat.text": "full", "remat.vision": "full"}),
        (200, 2, ["mesh.data=4", "mesh.fsdp=4"], {"mesh.data": 1, "mesh.fsdp": 16}),
        (16, 20, [], {"batch.grad_accum_steps": 0, "mesh.fsdp": 8, "mesh.context": 2}),
        (240, 4, [], {"optimizer.first_moment_dtype": "bfloat16"}),
        (400, 0.1, [], {"topology": "v5e:4x8"}),
        (400, 0.1, ["batch.rows=16"], {"topology": "v5e:4x8", "batch.rows": 0}),
        (900, 1, [], None),
    ],
)
def test_the_smallest_change_that_fits(state, row, changes, expected):
    planner = FakePlanner(state, row)
    chosen = config(*changes)
    plan = planner(chosen, V5E)
    assert not plan.fits
    found = search.smallest_change(chosen, plan, planner)
    if expected is None:
        assert found is None
        assert "no change" in report.render_change(None, None)
        return
    change, fitting = found
    assert change == expected
    assert fitting.fits
    text = report.render_change(change, fitting)
    assert all(
        f"{key.replace('topology', '--topology')}" in text and f"{value}" in text for key, value in change.items()
    )


def test_the_table_has_every_candidate():
    found = list(search.search(config(), V5E, FakePlanner(64, 3)))
    lines = report.table(found).splitlines()
    assert len(lines) == 1 + len(found) + 1
    assert sum(line.startswith("*") for line in lines) == len(search.pareto([p for _, p in found if p])) > 0
    assert sum("does not fit" in line for line in lines) == sum(bool(p) and not p.fits for _, p in found) > 0
    assert sum("passed over" in line for line in lines) == sum(p is None for _, p in found) > 0


def test_the_fastest_plan_is_given_as_flags():
    run = config()
    found = list(search.search(run, V5E, FakePlanner(64, 3)))
    text = report.render_fastest(run, found)
    best = max((p for _, p in found if p and p.headroom >= 0.1 * V5E.chip.hbm_bytes), key=lambda plan: plan.speed)
    assert f"--config.remat.text={best.remat['text']}" in text
    assert f"--config.mesh.fsdp={best.mesh['fsdp']}" in text
    assert f"{best.predicted_mfu:.0%} MFU" in text
    assert report.render_fastest(run, [(one, None) for one, _ in found]) == ""
