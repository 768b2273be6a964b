#!/usr/bin/env python3
r"""Renders an indexed job for `vl3 batch` on many machines of a GKE cluster, each with one accelerator.

    python launch/gke/render_batch.py --name captions --image IMAGE --accelerator v6e --shards 32 --claim files --spot \
        -- --model /files/model --in /files/requests.jsonl --out /files/answers.jsonl > job.yaml
    kubectl apply -f job.yaml

The claim is a PersistentVolumeClaim that all machines mount for reading and writing (ReadWriteMany, as of Filestore).
What follows `--` are the arguments of `vl3 batch`. Requests are divided by what they are, so the same job with another
number of shards goes on where an earlier one was stopped. The last shard to end merges all answers.
"""

import argparse
import pathlib
import shlex
import string
import sys
from collections.abc import Sequence

import yaml
from render import ACCELERATORS, NAME, SPOT, print_manifest

from vl3_jax.errors import InputError

TEMPLATE = pathlib.Path(__file__).with_name("batch_job.yaml")
# Machines of one TPU chip.
_SINGLE_CHIPS = ("v5e", "v6e")


def render(arguments: argparse.Namespace) -> str:
    """Returns the manifest as YAML.

    Args:
      arguments: The parsed flags; `batch` holds the arguments of `vl3 batch`, `argv` the whole command line.

    Raises:
      InputError: A name that Kubernetes refuses, a number out of range, or files that are not on the volume.
    """
    for name in ("name", "claim"):
        if not NAME.fullmatch(getattr(arguments, name)):
            raise InputError(
                f"--{name} {getattr(arguments, name)}: use lower-case letters, digits and '-', at most 40, starting "
                "with a letter"
            )
    if min(arguments.shards, arguments.max_restarts + 1) < 1:
        raise InputError("--shards must be at least 1, --max-restarts must not be negative")
    if any(word.partition("=")[0] == "--shard" for word in arguments.batch):
        raise InputError("--shard is that of each machine; give their number as --shards")
    mount = pathlib.PurePosixPath(arguments.mount)
    for flag in ("--in", "--out"):
        file = _value(arguments.batch, flag)
        if file is None or not pathlib.PurePosixPath(file).is_relative_to(mount):
            raise InputError(f"{flag} {file or ''}: give a file under {mount}, where all machines see it")
    fields = vars(arguments) | {"parallelism": arguments.parallelism or arguments.shards}
    job = yaml.safe_load(string.Template(TEMPLATE.read_text()).substitute(fields))
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    if arguments.accelerator in _SINGLE_CHIPS:
        resource = "google.com/tpu"
        pod["nodeSelector"] = {
            "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[arguments.accelerator],
            "cloud.google.com/gke-tpu-topology": "1x1",
        }
    else:
        resource = "nvidia.com/gpu"
        pod["nodeSelector"] = {"cloud.google.com/gke-accelerator": arguments.accelerator}
    container["resources"] = {"requests": {resource: 1}, "limits": {resource: 1}}
    container["args"] = list(arguments.batch)
    if arguments.service_account:
        pod["serviceAccountName"] = arguments.service_account
    if arguments.spot:
        pod["nodeSelector"][SPOT] = "true"
        pod["tolerations"] = [{"key": SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    command = shlex.join(["launch/gke/render_batch.py", *arguments.argv])
    return f"# {command}\n" + yaml.safe_dump(job, sort_keys=False)


def _value(words: Sequence[str], flag: str) -> str | None:
    """Returns the value of a flag, `--flag VALUE` or `--flag=VALUE`, among the words of a command."""
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == flag:
            return value if equals else next(iter(words[index + 1 :]), None)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the manifest; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--name", required=True, help="name of the job")
    add("--image", required=True, help="image that was built from launch/gke/Dockerfile and pushed")
    add("--accelerator", required=True, help="v5e or v6e (one chip), or a GPU of GKE, such as nvidia-l4")
    add("--shards", type=int, required=True, help="number of parts, each answered on a machine of its own")
    add("--parallelism", type=int, default=0, help="machines at a time (as many as there are shards)")
    add("--claim", required=True, help="PersistentVolumeClaim with the files")
    add("--mount", default="/files", help="folder where the claim is mounted (/files)")
    add("--spot", action="store_true", help="use spot machines, which can be preempted")
    add("--service-account", default="", help="Kubernetes service account")
    add("--max-restarts", type=int, default=20, help="restarts of each shard (20)")
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    arguments = parser.parse_args(argv[:end])
    arguments.batch, arguments.argv = argv[end + 1 :], argv
    return print_manifest(render, arguments, "render_batch.py")


if __name__ == "__main__":
    sys.exit(main())
