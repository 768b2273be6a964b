#!/usr/bin/env python3
r"""A JobSet for `vl3 train` on TPU slices of a GKE cluster.

    python launch/gke/render.py --name stage4 --image IMAGE --topology v5e:8x8 --config configs/stage4_7b.py \
        --workdir gs://bucket/stage4 [--slices 2] [--spot] [--config.key=value]... > job.yaml
    kubectl apply -f job.yaml

The cluster needs node pools of the topology (one a slice) and JobSet (https://jobset.sigs.k8s.io). A slice that fails
or is taken away restarts the whole job, which goes on from its last checkpoint; bad input (exit code 2) ends it.
"""

import argparse
import pathlib
import re
import shlex
import string
import sys
from collections.abc import Sequence

import yaml

from vl3_jax.errors import InputError
from vl3_jax.parallel.topologies import Topology, parse_topology

TEMPLATE = pathlib.Path(__file__).with_name("jobset.yaml")
# Labels of the nodes, by the compiler's name of the chip.
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
SPOT = "cloud.google.com/gke-spot"
_CHIPS_A_HOST = 4
_ONE_HOST = {(1, 1): 1, (2, 4): 8}  # slices of v5e and v6e that are a single machine of another kind
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")


def hosts_and_chips(topology: Topology) -> tuple[int, int]:
    """Machines of a slice, and chips that each of them holds.

    Raises:
      InputError: a shape that machines do not divide.
    """
    each = _ONE_HOST.get(topology.shape, _CHIPS_A_HOST)
    if topology.chips % each:
        raise InputError(f"topology {topology.name}: its chips do not fill machines of {each}")
    return topology.chips // each, each


def rendered(arguments: argparse.Namespace) -> str:
    """The manifest.

    Raises:
      InputError: a name that Kubernetes refuses, a topology that there is not, a workdir that hosts do not share.
    """
    topology = parse_topology(arguments.topology)
    hosts, chips = hosts_and_chips(topology)
    if not _NAME.fullmatch(arguments.name):
        raise InputError(f"--name {arguments.name}: small letters, digits and '-', at most 40, beginning with a letter")
    if not arguments.workdir.startswith("gs://"):
        raise InputError(f"--workdir {arguments.workdir}: must be gs://..., which all hosts share")
    if min(arguments.slices, arguments.max_restarts + 1, arguments.grace_seconds, arguments.hang_seconds + 1) < 1:
        raise InputError("--slices and --grace-seconds are at least 1, the other numbers are not negative")
    changes = list(arguments.changes)
    if not any(change.startswith("--config.expect_devices=") for change in changes):
        changes.append(f"--config.expect_devices={topology.chips * arguments.slices}")
    text = string.Template(TEMPLATE.read_text()).substitute(
        name=arguments.name,
        image=arguments.image,
        accelerator=ACCELERATORS[topology.chip.name],
        shape=topology.name.partition(":")[2],
        hosts=hosts,
        chips=chips,
        slices=arguments.slices,
        max_restarts=arguments.max_restarts,
        grace=arguments.grace_seconds,
    )
    job = yaml.safe_load(text)
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    # A supervisor saves within the time that the cluster gives, less a little to end by itself.
    own = ["--hang-seconds", str(arguments.hang_seconds), "--grace-seconds", str(max(arguments.grace_seconds - 20, 1))]
    if arguments.xla_flags:
        own += ["--xla-flags", topology.chip.name, "--slices", str(arguments.slices)]
    train = ["--config", arguments.config, "--workdir", arguments.workdir, *changes]
    pod["containers"][0]["args"] = [*own, "--", *train]
    if arguments.service_account:
        pod["serviceAccountName"] = arguments.service_account
    if arguments.spot:
        pod["nodeSelector"][SPOT] = "true"
        pod["tolerations"] = [{"key": SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    return f"# {shlex.join(['launch/gke/render.py', *arguments.given])}\n" + yaml.safe_dump(job, sort_keys=False)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; `changes` are those of the configuration, `given` all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--name", required=True, help="of the job")
    parser.add_argument("--image", required=True, help="as built from launch/gke/Dockerfile and pushed")
    parser.add_argument("--topology", required=True, help="of a slice, such as v5e:8x8 or v5p-128")
    parser.add_argument("--config", required=True, help="a file of configs/, as in the image")
    parser.add_argument("--workdir", required=True, help="gs://bucket/folder")
    parser.add_argument("--slices", type=int, default=1, help="of a multi-slice job (1)")
    parser.add_argument("--spot", action="store_true", help="on machines that may be taken away")
    parser.add_argument("--service-account", default="", help="of Kubernetes, with access to the bucket")
    parser.add_argument("--max-restarts", type=int, default=50, help="of the whole job (50)")
    parser.add_argument("--hang-seconds", type=int, default=1800, help="without a report, then it restarts (1800)")
    parser.add_argument("--grace-seconds", type=int, default=600, help="to save before a machine goes (600)")
    parser.add_argument("--xla-flags", action="store_true", help="the compiler's flags for this chip")
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments, changes = parser.parse_known_args(argv)
    for change in changes:
        if not re.match(r"--config\.[\w.]+=", change):
            parser.error(f"unknown argument {change}; settings are --config.key=value")
    arguments.changes, arguments.given = changes, argv
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the manifest."""
    arguments = parsed(argv)
    try:
        print(rendered(arguments), end="")
    except InputError as error:
        print(f"render.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
