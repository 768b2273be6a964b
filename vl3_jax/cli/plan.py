"""`vl3 plan`: memory and speed of a training step, of inference or of tracking on a TPU slice, without a TPU."""

import argparse
import json
import logging
import pathlib
import re

from vl3_jax.cli import generation_flags, settings_flags, streams
from vl3_jax.cli.train import CONFIG, CONFIG_HELP
from vl3_jax.config_tree import Limits

logger = logging.getLogger(__name__)

EPILOG = """examples:
  vl3 plan --config stage4:7b --topology v5e:8x8
  vl3 plan --config stage4:2b --topology v5litepod-16 --config.mesh.fsdp=8 --config.mesh.data=2 --json
  vl3 plan --config stage4:2b --topology v5p-16 --search --record plans.jsonl
  vl3 plan --serve 7b --topology v5e:2x2 --rows 4 --prompt 16384 --new 1024
  vl3 plan --track 2.1-large --topology v5e:1x1 --objects 5

The real programs are compiled by the TPU compiler on this machine (pip install 'vl3_jax[plan]', Linux on x86),
which takes minutes for the large models. Topologies are the compiler's names (v5e:8x8) or the cloud's (v5litepod-64,
v5p-128, v6e-64). What does not fit is tried again with one change after another until it does.
exit codes: 0 it fits, 1 it does not, 2 bad input"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from vl3_jax.planning.plan_serving import Workload
    from vl3_jax.planning.plan_tracking import TrackingWorkload

    parser.epilog = EPILOG
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--config", metavar=CONFIG, help=f"a training step: {CONFIG_HELP}")
    subject.add_argument("--serve", metavar="MODEL", help="inference instead: 2b, 7b or another preset")
    subject.add_argument("--track", metavar="MODEL", help="tracking by SAM-2: 2.1-large, 2.0-tiny or another size")
    parser.add_argument("--topology", required=True, metavar="NAME", help="such as v5e:8x8 or v5litepod-64")
    parser.add_argument(
        "--slices",
        type=settings_flags.number(int, Limits(1, 1024)),
        default=1,
        metavar="N",
        help="slices, joined by a network (default: %(default)s)",
    )
    settings_flags.add_changes(parser)
    hlo_help = "write optimised HLO text: a file, with --serve and --track a folder"
    parser.add_argument("--hlo", type=pathlib.Path, metavar="PATH", help=hlo_help)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    group = parser.add_argument_group("more than one plan of a step")
    group.add_argument("--search", action="store_true", help="try meshes, rows at a time and remat policies: a table")
    group.add_argument("--no-change", action="store_true", help="do not look for the change that makes it fit")
    group.add_argument("--record", metavar="FILE", help="file that keeps plans, so that none is made twice")
    group = parser.add_argument_group("inference")
    settings_flags.add(group, Workload, {name: f"--{name}" for name in ("rows", "prompt", "new", "patches")})
    group.add_argument("--mesh", metavar="AXIS=N,...", help="such as data=2,tensor=4 (default: heads over chips)")
    group.add_argument("--quantize", choices=["int8"], help="weights in int8")
    group = parser.add_argument_group("tracking")
    settings_flags.add(group, TrackingWorkload, {name: f"--{name}" for name in ("objects", "prompted", "chunk")})


def run(arguments: argparse.Namespace) -> int:
    """Prints a plan, a search, or the plan of inference or of tracking."""
    from vl3_jax.errors import InputError
    from vl3_jax.parallel.topologies import parse_topology

    if arguments.hlo and arguments.search:
        raise InputError("--hlo: give it for one plan, without --search")
    is_step = arguments.config is not None
    folder = arguments.hlo and arguments.hlo.parent if is_step else arguments.hlo
    if folder and not folder.is_dir():
        raise InputError(f"--hlo {arguments.hlo}: no folder {folder}; create it")
    topology = parse_topology(arguments.topology, arguments.slices)
    run_plan = _train if is_step else _serve if arguments.serve is not None else _track
    return run_plan(arguments, topology)


def _serve(arguments: argparse.Namespace, topology) -> int:
    from vl3_jax.planning.plan_serving import Workload, plan_serving

    with generation_flags.naming_flags():
        workload = Workload(**settings_flags.given(arguments, Workload))
    plan = plan_serving(arguments.serve, topology, workload, _mesh(arguments.mesh), arguments.quantize, arguments.hlo)
    print(json.dumps(plan.as_json()) if arguments.json else plan)
    return 0 if plan.fits else 1


def _track(arguments: argparse.Namespace, topology) -> int:
    from vl3_jax.planning.plan_tracking import TrackingWorkload, plan_tracking

    with generation_flags.naming_flags():
        workload = TrackingWorkload(**settings_flags.given(arguments, TrackingWorkload))
    plan = plan_tracking(arguments.track, topology, workload, hlo=arguments.hlo)
    print(json.dumps(plan.as_json()) if arguments.json else plan)
    return 0 if plan.fits else 1


def _train(arguments: argparse.Namespace, topology) -> int:
    from vl3_jax.planning import report, search
    from vl3_jax.planning.plan_cache import PlanCache
    from vl3_jax.training import run_config
    from vl3_jax.training.setup import batch_note

    config, planner = run_config.load(arguments.config, arguments.set), PlanCache(arguments.record)
    if arguments.search:
        return _search(arguments, config, topology, planner)
    plan = planner(config, topology, arguments.hlo)
    change = fitting = None
    if not (plan.fits or arguments.no_change):
        logger.info("it does not fit; looking for a change that makes it")
        change, fitting = search.smallest_change(config, plan, planner) or (None, None)
    if arguments.json:
        remedy = {"change": change, "changed": fitting and fitting.as_json()} if not plan.fits else {}
        print(json.dumps(plan.as_json() | remedy))
    else:
        print(report.render(plan, sum(config.data.amounts.values())))
        if note := batch_note(config, plan.samples):
            print(f"samples       about {plan.samples:.0f} a step{note}")
        if not (plan.fits or arguments.no_change):
            print(report.render_change(change, fitting))
    return 0 if plan.fits else 1


def _search(arguments: argparse.Namespace, config, topology, planner) -> int:
    from tqdm import tqdm

    from vl3_jax.planning import report, search

    results = []
    with tqdm(search.search(config, topology, planner), total=len(search.candidates(topology)), unit=" plans") as bar:
        try:
            with streams.raising_interrupts():
                for candidate, plan in bar:
                    results.append((candidate, plan))
        except KeyboardInterrupt:
            logger.info("stopped; the plans made until now:")
    if arguments.json:
        best = search.pareto([plan for _, plan in results if plan])
        plans = [plan.as_json() | {"pareto": plan in best} for _, plan in results if plan]
        print(json.dumps({"fits": bool(best), "plans": plans}))
    else:
        print(report.table(results))
        print(report.render_fastest(config, results))
    return 0 if any(plan and plan.fits for _, plan in results) else 1


def _mesh(text: str | None) -> dict[str, int] | None:
    from vl3_jax.errors import InputError, printable

    if text is None:
        return None
    pairs = [pair.partition("=") for pair in text.split(",")]
    sizes = {axis: int(size) for axis, _, size in pairs if re.fullmatch(r"\d{1,9}|-1", size)}
    if len(sizes) < len(pairs):
        raise InputError(f"--mesh {printable(text)}; give each axis once, as axis=size, such as data=2,tensor=4")
    return sizes
