#!/usr/bin/env python3
r"""Renders a JobSet for `vl3 train` on TPU slices of a GKE cluster.

    python launch/gke/render.py --name stage4 --image IMAGE --topology v5e:8x8 --config stage4:7b \
        --workdir gs://bucket/stage4 [--slices 2] [--spot] [--config.key=value]... > job.yaml
    kubectl apply -f job.yaml

The cluster needs node pools of the topology (one for each slice) and JobSet (https://jobset.sigs.k8s.io). A slice that
fails or is preempted restarts the whole job from its last checkpoint; bad input (exit code 2) ends it.
"""

import argparse
import pathlib
import re
import shlex
import string
import sys
from collections.abc import Callable, Sequence

import yaml

from vl3_jax.errors import InputError
from vl3_jax.parallel.topologies import parse_topology

TEMPLATE = pathlib.Path(__file__).with_name("jobset.yaml")
# Accelerator labels of GKE nodes, by the compiler's name of the chip.
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
SPOT = "cloud.google.com/gke-spot"
_CHIPS_PER_HOST = 4
_SINGLE_HOST = {(1, 1): 1, (2, 4): 8}  # slices of v5e and v6e on a single machine of another type: chips
NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")


def render(arguments: argparse.Namespace) -> str:
    """Returns the manifest as YAML.

    Args:
      arguments: The parsed flags; `changes` holds the --config.key=value settings, `argv` the whole command line.

    Raises:
      InputError: A name that Kubernetes refuses, an unknown topology or one whose chips do not fill machines, a
        workdir that hosts do not share, or a number out of range.
    """
    topology = parse_topology(arguments.topology)
    chips = _SINGLE_HOST.get(topology.shape, _CHIPS_PER_HOST)
    if topology.chips % chips:
        raise InputError(f"topology {topology.name}: its chips do not fill machines of {chips}")
    if not NAME.fullmatch(arguments.name):
        raise InputError(
            f"--name {arguments.name}: use lower-case letters, digits and '-', at most 40, starting with a letter"
        )
    if not arguments.workdir.startswith("gs://"):
        raise InputError(f"--workdir {arguments.workdir}: must be gs://..., shared by all hosts")
    if min(arguments.slices, arguments.max_restarts + 1, arguments.grace_seconds, arguments.hang_seconds + 1) < 1:
        raise InputError("--slices and --grace-seconds must be at least 1, the other numbers must not be negative")
    changes = list(arguments.changes)
    if not any(change.startswith("--config.expect_devices=") for change in changes):
        changes.append(f"--config.expect_devices={topology.chips * arguments.slices}")
    text = string.Template(TEMPLATE.read_text()).substitute(
        vars(arguments),
        accelerator=ACCELERATORS[topology.chip.name],
        shape=topology.name.partition(":")[2],
        hosts=topology.chips // chips,
        chips=chips,
    )
    job = yaml.safe_load(text)
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    # The launcher must save and exit before the cluster kills the pod, so it gets 20 s less.
    grace_seconds = max(arguments.grace_seconds - 20, 1)
    launcher_flags = ["--hang-seconds", str(arguments.hang_seconds), "--grace-seconds", str(grace_seconds)]
    if arguments.xla_flags:
        launcher_flags += ["--xla-flags", topology.chip.name, "--slices", str(arguments.slices)]
    train = ["--config", arguments.config, "--workdir", arguments.workdir, *changes]
    pod["containers"][0]["args"] = [*launcher_flags, "--", *train]
    if arguments.service_account:
        pod["serviceAccountName"] = arguments.service_account
    if arguments.spot:
        pod["nodeSelector"][SPOT] = "true"
        pod["tolerations"] = [{"key": SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    return f"# {shlex.join(['launch/gke/render.py', *arguments.argv])}\n" + yaml.safe_dump(job, sort_keys=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the manifest; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--name", required=True, help="name of the job")
    add("--image", required=True, help="image that was built from launch/gke/Dockerfile and pushed")
    add("--topology", required=True, help="topology of a slice, such as v5e:8x8 or v5p-128")
    add("--config", required=True, help="name or file of a configuration, as in `vl3 train`")
    add("--workdir", required=True, help="gs://bucket/folder")
    add("--slices", type=int, default=1, help="number of slices (1)")
    add("--spot", action="store_true", help="use spot machines, which can be preempted")
    add("--service-account", default="", help="Kubernetes service account with access to the bucket")
    add("--max-restarts", type=int, default=50, help="restarts of the whole job (50)")
    add("--hang-seconds", type=int, default=1800, help="restart after S seconds without progress (1800)")
    add("--grace-seconds", type=int, default=600, help="time to save before a machine stops (600)")
    add("--xla-flags", action="store_true", help="set the compiler flags for this chip")
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments, changes = parser.parse_known_args(argv)
    for change in changes:
        if not re.match(r"--config\.[\w.]+=", change):
            parser.error(f"unknown argument {change}; settings are --config.key=value")
    arguments.changes, arguments.argv = changes, argv
    return print_manifest(render, arguments, "render.py")


def print_manifest(render: Callable[[argparse.Namespace], str], arguments: argparse.Namespace, program: str) -> int:
    """Prints a manifest, or why there is none, and returns the exit code."""
    try:
        print(render(arguments), end="")
    except InputError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
