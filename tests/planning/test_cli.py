"""`vl3 plan`: with the TPU compiler, without a TPU."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from flax.traverse_util import flatten_dict

from planning.fake_plans import FakePlanner
from support.compiler import needs_compiler
from vl3_jax.checkpoint.loading import most_on_host
from vl3_jax.cli.main import main
from vl3_jax.model import preset
from vl3_jax.model.serving_layout import abstract_serving_params
from vl3_jax.parallel.topologies import GIB, parse_topology
from vl3_jax.planning import compiler, plan_cache
from vl3_jax.planning.plan_serving import ServingPlan, Workload
from vl3_jax.planning.program_cost import NO_COST, program_cost

BUDGETS = json.loads(pathlib.Path(__file__).with_name("budgets.json").read_text())
STAGE_FOUR = ["--config", "stage4:2b", "--topology", "v5e:4x4"]


def plan(*flags):
    """Runs the command in a process of its own, which sees other devices than this one."""
    command = [sys.executable, "-m", "vl3_jax.cli.main", "plan", "--json", *flags]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-2000:]
    return done.returncode, json.loads(done.stdout)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", BUDGETS)
def test_a_step_keeps_to_its_budget(name):
    """A change of the code that needs more memory, cycles or traffic must update the budget."""
    budget = BUDGETS[name]
    config, topology, *changes = budget["plan"]
    code, found = plan("--config", config, "--topology", topology, *changes)
    assert (code, found["fits"]) == (0, True)
    memory = found["hbm_bytes_per_chip"]
    traffic = {kind: one["bytes"] for kind, one in found["collectives"].items()}
    cycles = found["cycles"]
    print(f"{name}: {memory}, {cycles}, {traffic}")
    assert 0 < memory["arguments"] < memory["peak"] < memory["limit"]
    assert memory["peak"] <= 1.02 * budget["peak"]
    assert memory["temporaries"] <= 1.02 * budget["temporaries"]
    assert cycles["total"] <= 1.05 * budget["cycles"]
    assert cycles["total"] == sum(count for scope, count in cycles.items() if scope != "total")
    assert not {kind: size for kind, size in traffic.items() if size > 1.02 * budget["traffic"].get(kind, 0)}
    assert found["windowed_products"] == 0
    assert found["row_length"] == 512
    assert found["flops_per_chip"] > 0
    assert found["compile_seconds"] > 0


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("config", "topology"), [("stage4:2b", "v5e-16"), ("stage4:7b", "v5e-64")])
def test_stage_four_fits(config, topology):
    """Rows of 40,960 patches and 16,384 tokens, one at a time on each chip."""
    code, found = plan("--config", config, "--topology", topology)
    memory = found["hbm_bytes_per_chip"]
    seconds = found["compile_seconds"]
    peak, mfu = memory["peak"] / 2**30, found["predicted_mfu"]
    print(f"{config} on {topology}: {peak:.2f} GiB a chip, {mfu:.0%} MFU, compiled in {seconds:.0f} s")
    assert (code, found["fits"]) == (0, True)
    assert memory["peak"] < 0.85 * memory["limit"]
    assert found["windowed_products"] == 0
    assert 0.2 < found["predicted_mfu"] < 1
    assert 0.7 < found["useful_share"] < 1


@needs_compiler
def test_a_plan_of_inference(tmp_path):
    sizes = ["--rows", "2", "--prompt", "512", "--new", "64", "--hlo", str(tmp_path)]
    code, found = plan("--serve", "tiny", "--topology", "v5e:2x2", *sizes)
    memory = found["hbm_bytes_per_chip"]
    assert (code, found["fits"], found["mesh"]["tensor"]) == (0, True, 2)
    assert set(found["programs"]) == {"encode", "prefill", "decode"}
    for name, program in found["programs"].items():
        cost = program_cost((tmp_path / f"{name}.hlo").read_text())
        assert cost.as_json() == {key: program[key] for key in cost.as_json()}
        assert (cost.windowed_products, program["cycles"]["total"] > 0) == (0, True)
        assert memory["weights"] < program["arguments"] < program["peak"] <= memory["peak"] < memory["limit"]
    assert found["programs"]["decode"]["arguments"] >= memory["weights"] + memory["cache"]
    # A chip needs nothing besides the weights; tests/checkpoint/test_serving_load.py shows what a host holds.
    sizes = [2 * leaf.size for leaf in flatten_dict(abstract_serving_params(preset("tiny"))).values()]
    assert found["loading"] == {"peak": memory["weights"], "transient": 0, "host": most_on_host(sizes)}


def test_a_plan_of_inference_tells_what_loading_needs():
    programs = {"decode": compiler.ProgramAnalysis(True, 0, 0, 9 * GIB, NO_COST, 1.0)}
    plan = ServingPlan(parse_topology("v5e:1x1"), {"data": 1}, Workload(), 8 * GIB, GIB, 2 * GIB, programs)
    assert "loading       8.00 GiB at its peak, nothing besides the weights; 2.00 GiB on a host\n" in str(plan)


def test_a_step_that_does_not_fit_names_the_excess_and_a_remedy(monkeypatch, capsys):
    monkeypatch.setattr(plan_cache, "plan_step", FakePlanner(state=16, row=20))
    assert main(["plan", *STAGE_FOUR]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "it does not fit, by 5.25" in lines[1]
    assert lines[-1].startswith(
        "it fits with --config.batch.grad_accum_steps=0 --config.mesh.fsdp=8 --config.mesh.context=2"
    )
    assert main(["plan", *STAGE_FOUR, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["change"] == {"batch.grad_accum_steps": 0, "mesh.fsdp": 8, "mesh.context": 2}
    assert found["changed"]["fits"]
    assert not found["fits"]
    assert main(["plan", *STAGE_FOUR, "--no-change"]) == 1
    assert "it fits with" not in capsys.readouterr().out


def test_a_search_and_its_record(monkeypatch, capsys, tmp_path):
    planner = FakePlanner(state=64, row=3)
    monkeypatch.setattr(plan_cache, "plan_step", planner)
    flags = [*STAGE_FOUR, "--search", "--record", f"{tmp_path / 'plans.jsonl'}"]
    assert main(["plan", *flags]) == 0
    table = capsys.readouterr().out
    made = planner.compiled
    assert main(["plan", *flags]) == 0
    assert capsys.readouterr().out == table
    assert planner.compiled == made
    assert main(["plan", *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(plan["pareto"] for plan in found["plans"]) == sum(line.startswith("*") for line in table.splitlines())


def test_a_stopped_search_shows_its_plans(monkeypatch, capsys):
    planner = FakePlanner(state=16, row=1)

    def interrupted(config, topology, hlo=None, analyze=None):
        if len(planner.plans) == 3:
            raise KeyboardInterrupt
        return planner(config, topology)

    monkeypatch.setattr(plan_cache, "plan_step", interrupted)
    assert main(["plan", *STAGE_FOUR, "--search"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 3 + 1 + 1
    assert lines[-1].startswith("fastest with 10% of the memory to spare")


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm. Exceeded by 2.75G",
            18.5,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (19.21G) "
            "exceeds available HBM (15.75G).",
            19.21,
        ),
    ],
)
def test_the_compilers_refusal_is_read(message, gib):
    assert compiler.bytes_needed(message) == int(gib * 2**30)
    assert compiler.bytes_needed("something else") is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config", "nowhere.py", "--topology", "v5e:2x2"], "nowhere.py: no such configuration"),
        (["--config", "stage4:2b", "--topology", "v7:2x2"], "topology 'v7:2x2'"),
        ([*STAGE_FOUR, "--hlo", "nowhere/step.hlo"], "no folder nowhere"),
        ([*STAGE_FOUR, "--hlo", "step.hlo", "--search"], "without --search"),
        (["--serve", "3b", "--topology", "v5e:2x2"], "3b"),
        (["--serve", "2b", "--topology", "v5e:2x2", "--rows", "0"], "--rows"),
        (["--serve", "2b", "--topology", "v5e:2x2", "--mesh", "tensor:4"], "--mesh tensor:4"),
        (["--serve", "2b", "--topology", "v5e:2x2", "--prompt", "40000"], "exceed the context of 2b, 32768"),
    ],
)
def test_bad_input_is_one_line(flags, message, capsys):
    assert main(["plan", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
