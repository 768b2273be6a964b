"""Initialises `jax.distributed` from flags or from the environment."""

import os
import re

import jax

from vl3_jax.errors import InputError
from vl3_jax.platforms import on_tpu_machine

# Set by the schedulers for which JAX finds out address, number and index of the processes by itself: SLURM, Open MPI,
# TPU pods, indexed jobs of Kubernetes.
_CLUSTERS = (
    "SLURM_STEP_NODELIST",
    "OMPI_MCA_orte_hnp_uri",
    "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_ADDRESSES",
    "JOB_COMPLETION_INDEX",
)
_ADDRESS = re.compile(r"(\[[^\]]+\]|[^:\s]+):(?P<port>\d{1,5})")


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Connects the processes of a job; call it before anything else touches a device.

    A job of one process is left as it is. TPU machines and the clusters that JAX knows need no arguments.

    Args:
      coordinator: host:port of the first process. None reads the environment: JAX_COORDINATOR_ADDRESS with
        JAX_NUM_PROCESSES and JAX_PROCESS_ID, or the variables of a cluster that JAX knows.
      num_processes: Number of processes; needs a coordinator.
      process_id: Index of this process, counted from 0; needs a coordinator.

    Raises:
      InputError: The settings are incomplete or contradict each other.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator:
        num_processes = _number("JAX_NUM_PROCESSES", num_processes)
        process_id = _number("JAX_PROCESS_ID", process_id)
        if num_processes is None or process_id is None or not 0 <= process_id < num_processes:
            raise InputError(
                f"process {process_id} of {num_processes} with coordinator {coordinator}; give --processes N and "
                "--process-id 0 ... N - 1"
            )
        address = _ADDRESS.fullmatch(coordinator)
        if address is None or not 0 < int(address["port"]) < 2**16:
            raise InputError(f"coordinator {coordinator!r}; give HOST:PORT, such as 10.0.0.2:8476")
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif num_processes is not None or process_id is not None:
        raise InputError("--processes and --process-id need --coordinator HOST:PORT")
    elif any(name in os.environ for name in _CLUSTERS) or on_tpu_machine():
        jax.distributed.initialize()


def _number(variable: str, argument: int | None) -> int | None:
    """Returns `argument`, or the environment variable where it is None."""
    text = os.environ.get(variable)
    if argument is not None or text is None:
        return argument
    if not text.isdecimal():
        raise InputError(f"{variable} is {text!r}; give a number")
    return int(text)
