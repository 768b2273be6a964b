"""`vl3 plan`: whether a training step fits a TPU slice, and what it costs, before there is a TPU."""

import argparse
import json

EPILOG = """examples:
  vl3 plan --config configs/stage4_7b.py --topology v5e:8x8
  vl3 plan --config configs/stage4_2b.py --topology v5litepod-16 --config.mesh.fsdp=8 --config.mesh.data=2 --json

The real train step is compiled by the real TPU compiler on this machine (pip install 'vl3_jax[plan]', Linux on x86),
which takes minutes for the large models. Topologies are the compiler's names (v5e:8x8) or the cloud's (v5litepod-64,
v5p-128, v6e-64). Without batch.rows a step has one row for each part that the mesh splits rows into.
exit codes: 0 it fits, 1 it does not, 2 bad input"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's flags."""
    parser.epilog = EPILOG
    parser.add_argument("--config", required=True, metavar="FILE", help="a file of configs/, or your own")
    parser.add_argument("--topology", required=True, metavar="NAME", help="such as v5e:8x8 or v5litepod-64")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as --config.KEY=VALUE")
    parser.add_argument("--mfu", type=float, default=0.4, help="assumed for the estimate of speed (default 0.4)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan."""
    from vl3_jax import config_file
    from vl3_jax.errors import InputError
    from vl3_jax.parallel.topologies import topology
    from vl3_jax.training import planning

    if not 0 < arguments.mfu <= 1:
        raise InputError(f"--mfu {arguments.mfu}; give a share of the peak, above 0 and at most 1")
    slice_ = topology(arguments.topology)
    config = config_file.load(arguments.config, arguments.set)
    plan = planning.compile_plan(config, slice_)
    if arguments.json:
        print(json.dumps(plan.as_json()))
    else:
        amount = sum(config.data.amounts.values()) if "amounts" in config.data else 0
        print(planning.rendered(plan, arguments.mfu, amount))
    return 0 if plan.fits else 1
