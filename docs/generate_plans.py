"""Plans of the released sizes on common slices: writes docs/plans.md.

    python docs/generate_plans.py --record plans.jsonl [--jobs N] [--only 2b-v5e-16 ...] [--out docs/plans.md]

The step with the longest rows is compiled with the settings of its configuration, and where that leaves memory, with
less recomputation; where it does not fit, with one change after another until it does. The step with the shortest rows,
which most steps have, is compiled with the best settings. A program takes some minutes of one core, and there are about
25; programs in the record are not compiled again, so the script may be stopped at any time.
"""

import argparse
import concurrent.futures
import math
import multiprocessing
import pathlib
import sys

from tqdm import tqdm

from vl3_jax import config_tree
from vl3_jax.model import preset
from vl3_jax.parallel.topologies import GIB, parse_topology
from vl3_jax.planning.plan_cache import PlanCache
from vl3_jax.planning.plan_step import KERNEL_SHARE, Plan
from vl3_jax.planning.report import SPARE, axes
from vl3_jax.planning.search import REMATS, smallest_change
from vl3_jax.training import run_config
from vl3_jax.versions import version

PAGE = pathlib.Path(__file__).with_name("plans.md")
MODELS, SLICES = ("2b", "7b"), ("v5e-16", "v5e-64", "v5p-64", "v6e-64")
# Memory of a policy relative to that of the policy before it, less than in any plan so far; decides what is tried.
GROWTH = {"outputs": 1.2, "dots": 4.0, "none": 2.8}


# Lines of the table by name: model and slice.
CELLS = {f"{model}-{name}": (model, name) for model in MODELS for name in SLICES}


def line(cell: str, record: str) -> str:
    """Plans a cell of `CELLS`, in a process of its own, and returns its row of the table."""
    model, name = CELLS[cell]
    config, topology, planner = run_config.load(f"stage4:{model}"), parse_topology(name), PlanCache(record)
    settings, samples = split(config.model, topology.chips), sum(config.data.amounts.values())
    config = config_tree.replace(config, settings)
    longest = config_tree.replace(config, {"data.shorter_lengths": ()})
    plain = planner(longest, topology)
    limit = topology.chip.hbm_bytes / GIB
    cells = [model, f"{name} ({topology.name})", axes(plain.mesh)]
    cells.append(f"{plain.program.peak / GIB:.2f} of {limit:.2f}" + ("" if plain.fits else ", **does not fit**"))
    improved = fastest_recomputation if plain.fits else smallest_change
    change, fitting = improved(longest, plain, planner) or ({}, None)
    if fitting is None:
        return "| " + " | ".join([*cells, "none found", *[""] * 7]) + " |"
    changes = {key: value for key, value in change.items() if key != "topology"}
    best = planner(config_tree.replace(config, changes), fitting.topology)
    hours = samples / best.samples * best.seconds / 3600
    cells.append(", ".join(f"`{key}={value}`" for key, value in (settings | change).items()) or "as it is")
    cells += [f"{best.program.peak / GIB:.2f}", str(best.rows), f"{best.seconds:.2f}", f"{best.predicted_mfu:.0%}"]
    cells += [f"{best.speed / 1e3:,.0f}k", f"{hours * best.topology.chips:,.0f}", bound(best)]
    return "| " + " | ".join(cells) + " |"


def fastest_recomputation(config: run_config.RunConfig, plain: Plan, planner: PlanCache) -> tuple[dict[str, str], Plan]:
    """Returns the change of a run that fits with which it is fastest in the memory it has, and its plan."""
    tried, most = [({}, plain)], (1 - SPARE) * plain.topology.chip.hbm_bytes
    for policy in REMATS[REMATS.index(plain.remat["text"]) + 1 :]:
        if tried[-1][1].program.peak * GROWTH[policy] > most:
            break
        change = {"remat.vision": policy, "remat.text": policy}
        plan = planner(config_tree.replace(config, change), plain.topology)
        if not plan.fits or plan.program.peak > most:
            break
        tried.append((change, plan))
    return max(tried, key=lambda choice: choice[1].speed)


def bound(plan: Plan) -> str:
    """Returns the shares of the parts of a step's predicted time: the largest scopes of cycles, kernels and links."""
    clock, cost = plan.topology.chip.clock, plan.program.cost
    parts = {scope: cycles / clock for scope, cycles in cost.cycles.items()}
    parts |= {name: seconds for name, seconds in plan.parts.items() if name != "cycles"}
    largest = sorted(parts.items(), key=lambda part: -part[1])[:5]
    return ", ".join(f"{name} {seconds / plan.seconds:.0%}" for name, seconds in largest)


def split(model: str, chips: int) -> dict[str, int]:
    """Returns a mesh where fsdp over all chips would leave the whole tower on each of them."""
    fsdp = math.gcd(chips, preset(model).vision.hidden_size)
    return {"mesh.data": chips // fsdp, "mesh.fsdp": fsdp} if fsdp < chips else {}


def page(lines: list[str], versions: str) -> str:
    """Returns the content of docs/plans.md."""
    return f"""# Plans

Plans of stage 4 of the released sizes on common slices, by `python docs/generate_plans.py --record FILE`: the training
step with rows of 11,264 (most) and 16,384 tokens and 40,960 patches, compiled for the slice by the TPU compiler
({versions}). Memory is the compiler's own figure, in GiB per chip. None of it was run on a TPU.

The best setting is the rematerialisation policy with which the step is fastest and {SPARE:.0%} of the memory stays
free; where a configuration does not fit, it is the cheapest change that makes it fit.

The time of a step is predicted: the compiler's cycles outside the attention kernels, the blocks that the kernels visit
at {KERNEL_SHARE:.0%} of the chip's peak, what the other kernels read and write at the speed of the memory, and the
bytes of those collectives that nothing overlaps at the speed of the links, one after the other. Utilisation (MFU) is
the arithmetic that is neither padding nor recomputed, over what the chip could do in that time. The last column has
the five largest parts of the time.

A step of the paper has 128 samples, which fill about 55 rows. Every chip works on at least one row of its own.

| model | slice | mesh | HBM | best setting | HBM then | rows | seconds | MFU | tokens/s | chip-hours | time |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(lines)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", required=True, metavar="FILE", help="keeps plans")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="plans at a time, some GB of memory each (1)")
    parser.add_argument("--only", nargs="+", metavar="CELL", help="such as 2b-stage4-v5e-16; writes no page")
    parser.add_argument("--out", type=pathlib.Path, default=PAGE, metavar="FILE")
    arguments = parser.parse_args()
    if unknown := set(arguments.only or ()) - set(CELLS):
        sys.exit(f"generate_plans.py: no cell {min(unknown)}; there are {', '.join(CELLS)}")
    cells = [cell for cell in CELLS if not arguments.only or cell in arguments.only]
    spawn = multiprocessing.get_context("spawn")
    lines: dict[str, str] = {}
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        waiting = {pool.submit(line, cell, arguments.record): cell for cell in cells}
        for future in tqdm(concurrent.futures.as_completed(waiting), total=len(cells), unit=" cells"):
            lines[waiting[future]] = future.result()
            tqdm.write(future.result())
    if not arguments.only:
        versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "libtpu"))
        arguments.out.write_text(page([lines[cell] for cell in cells], versions))


if __name__ == "__main__":
    main()
