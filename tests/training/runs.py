"""Mock runs of `vl3 train`, in this process and in others."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np

from vl3_jax.checkpoint import load
from vl3_jax.cli.main import main
from vl3_jax.training.groups import flatten

ROOT = pathlib.Path(__file__).parents[2]


def command(config: str, workdir: os.PathLike, *changes: str) -> list[str]:
    """Returns the arguments of `vl3` for a mock run."""
    changes = [f"--config.{change}" for change in changes]
    return ["train", "--config", f"{config},mock", "--workdir", os.fspath(workdir), *changes]


def run(config: str, workdir: os.PathLike, *changes: str) -> int:
    """Trains in this process and returns the exit code."""
    return main(command(config, workdir, "log.tensorboard=False", *changes))


def start(config: str, workdir: os.PathLike, *changes: str, devices: int = 1, flags=(), **options) -> subprocess.Popen:
    """Trains in a process of its own."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    arguments = [*command(config, workdir, "log.tensorboard=False", *changes), *flags]
    return subprocess.Popen([sys.executable, "-m", "vl3_jax.cli.main", *arguments], env=environment, **options)


def free_port() -> int:
    """Returns a free port."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def params(workdir: os.PathLike, step: int) -> dict[str, np.ndarray]:
    """Returns the parameters of a checkpoint by path."""
    tree = load(pathlib.Path(workdir) / "checkpoints" / str(step)).params
    return {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}


def reports(workdir: os.PathLike) -> list[dict]:
    """Returns the lines of metrics.jsonl."""
    return [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
