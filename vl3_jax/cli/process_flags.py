"""The flags of commands that several processes run together."""

import argparse

from vl3_jax.cli import settings_flags
from vl3_jax.config_tree import AMOUNT, Limits


def add(parser: argparse.ArgumentParser) -> None:
    """Adds --coordinator, --processes and --process-id."""
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="coordinator of several processes; TPU pods and clusters need none"
    )
    parser.add_argument(
        "--processes",
        type=settings_flags.number(int, Limits(1, 65_536)),
        metavar="N",
        help="number of processes (with --coordinator)",
    )
    parser.add_argument(
        "--process-id",
        type=settings_flags.number(int, AMOUNT),
        metavar="I",
        help="number of this process (with --coordinator)",
    )


def connect(arguments: argparse.Namespace) -> None:
    """Connects the processes of the job, if there are several; before anything else touches a device."""
    from vl3_jax.parallel import processes

    processes.initialize(arguments.coordinator, arguments.processes, arguments.process_id)
