"""`vl3 plan`: whether a training step, or answering, fits a TPU slice, and what it costs, before there is a TPU."""

import argparse
import json
import sys

EPILOG = """examples:
  vl3 plan --config configs/stage4_7b.py --topology v5e:8x8
  vl3 plan --config configs/stage4_2b.py --topology v5litepod-16 --config.mesh.fsdp=8 --config.mesh.data=2 --json
  vl3 plan --config configs/stage4_2b.py --topology v5p-16 --search --record plans.jsonl
  vl3 plan --serve 7b --topology v5e:2x2 --rows 4 --prompt 16384 --new 1024

The real programs are compiled by the real TPU compiler on this machine (pip install 'vl3_jax[plan]', Linux on x86),
which takes minutes for the large models. Topologies are the compiler's names (v5e:8x8) or the cloud's (v5litepod-64,
v5p-128, v6e-64). What does not fit is tried again with one change after another until it does.
exit codes: 0 it fits, 1 it does not, 2 bad input"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.epilog = EPILOG
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="a training step: a file of configs/, or your own")
    what.add_argument("--serve", metavar="MODEL", help="answering instead: 2b, 7b or another preset")
    parser.add_argument("--topology", required=True, metavar="NAME", help="such as v5e:8x8 or v5litepod-64")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="of this topology, joined by a network (1)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as --config.KEY=VALUE")
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed for the estimate of speed (default 0.4)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    group = parser.add_argument_group("more than one plan of a step")
    group.add_argument("--search", action="store_true", help="try meshes, rows at a time and remat policies: a table")
    group.add_argument("--no-change", action="store_true", help="do not look for the change that makes it fit")
    group.add_argument("--record", metavar="FILE", help="keep plans there, and make none twice")
    group = parser.add_argument_group("answering")
    group.add_argument("--rows", type=int, default=1, metavar="N", help="conversations side by side (1)")
    group.add_argument("--prompt", type=int, default=16_384, metavar="N", help="tokens of each (16384)")
    group.add_argument("--new", type=int, default=1024, metavar="N", help="tokens of each answer (1024)")
    group.add_argument("--patches", type=int, default=16_384, metavar="N", help="of each one's media (16384)")
    group.add_argument("--mesh", metavar="AXIS=N,...", help="such as data=2,tensor=4 (tensor over key/value heads)")
    group.add_argument("--quantize", choices=["int8"], help="weights in int8")


def run(arguments: argparse.Namespace) -> int:
    """Prints plans."""
    from vl3_jax.errors import InputError
    from vl3_jax.parallel.topologies import parse_topology

    if not 0 < arguments.mfu <= 1:
        raise InputError(f"--mfu {arguments.mfu}; give a share of the peak, above 0 and at most 1")
    topology = parse_topology(arguments.topology, arguments.slices)
    return _serve(arguments, topology) if arguments.serve else _train(arguments, topology)


def _serve(arguments: argparse.Namespace, topology) -> int:
    from vl3_jax.errors import InputError
    from vl3_jax.planning.plan_serving import Workload, plan_serving

    sizes = (arguments.rows, arguments.prompt, arguments.new, arguments.patches)
    if min(sizes) < 1:
        raise InputError("--rows, --prompt, --new and --patches: give 1 or more")
    plan = plan_serving(arguments.serve, topology, Workload(*sizes), _mesh(arguments.mesh), arguments.quantize)
    print(json.dumps(plan.as_json()) if arguments.json else plan)
    return 0 if plan.fits else 1


def _train(arguments: argparse.Namespace, topology) -> int:
    from vl3_jax import config_file
    from vl3_jax.planning import report, search
    from vl3_jax.planning.plan_cache import PlanCache

    config, planner = config_file.load(arguments.config, arguments.set), PlanCache(arguments.record)
    if arguments.search:
        return _search(arguments, config, topology, planner)
    plan = planner(config, topology)
    change = fitting = None
    if not (plan.fits or arguments.no_change):
        print("it does not fit; looking for a change that makes it", file=sys.stderr)
        change, fitting = search.smallest_change(config, plan, planner) or (None, None)
    if arguments.json:
        other = {"change": change, "changed": fitting and fitting.as_json()} if not plan.fits else {}
        print(json.dumps(plan.as_json() | other))
    else:
        amount = sum(config.data.amounts.values()) if "amounts" in config.data else 0
        print(report.rendered(plan, arguments.mfu, amount))
        if not (plan.fits or arguments.no_change):
            print(report.rendered_change(change, fitting))
    return 0 if plan.fits else 1


def _search(arguments: argparse.Namespace, config, topology, planner) -> int:
    from tqdm import tqdm

    from vl3_jax.planning import report, search

    found = []
    with tqdm(search.search(config, topology, planner), total=len(search.candidates(topology)), unit=" plans") as bar:
        try:
            for one, plan in bar:
                found.append((one, plan))
        except KeyboardInterrupt:
            print("stopped; what was found until now:", file=sys.stderr)
    if arguments.json:
        best = search.pareto([plan for _, plan in found if plan], arguments.mfu)
        plans = [plan.as_json() | {"pareto": plan in best} for _, plan in found if plan]
        print(json.dumps({"fits": bool(best), "plans": plans}))
    else:
        print(report.table(found, arguments.mfu))
    return 0 if any(plan and plan.fits for _, plan in found) else 1


def _mesh(text: str | None) -> dict[str, int] | None:
    from vl3_jax.errors import InputError

    if text is None:
        return None
    try:
        return {axis: int(size) for axis, size in (pair.split("=") for pair in text.split(","))}
    except ValueError:
        raise InputError(f"--mesh {text}; give it as axis=size, such as data=2,tensor=4") from None
