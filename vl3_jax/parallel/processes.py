"""Initialises `jax.distributed` from flags or from the environment, and ends a process whose others are gone."""

import contextlib
import logging
import os
import re
from collections.abc import Iterator

import jax

from vl3_jax.errors import InputError, printable
from vl3_jax.platforms import on_tpu_machine

logger = logging.getLogger(__name__)

# A process that was not heard of for so long is taken as dead, and all others end.
HEARTBEAT_SECONDS = 60
_TIMEOUTS = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS, "shutdown_timeout_seconds": HEARTBEAT_SECONDS}
# In the errors of collectives, barriers and the coordination service where another process is gone.
_LOST = (
    "Gloo",
    "gloo",
    "NCCL",
    "closed by peer",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "heartbeat",
    "oordination service",
)
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
        jax.distributed.initialize(coordinator, num_processes, process_id, **_TIMEOUTS)
    elif num_processes is not None or process_id is not None:
        raise InputError("--processes and --process-id need --coordinator HOST:PORT")
    elif any(name in os.environ for name in _CLUSTERS) or on_tpu_machine():
        jax.distributed.initialize(**_TIMEOUTS)


@contextlib.contextmanager
def ended_by_lost_process() -> Iterator[None]:
    """Ends this process with one line and exit code 1 where another one of the job is gone.

    It ends at once: all that Python and JAX do at the end of a process waits for the others.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if jax.process_count() == 1 or not any(sign in text for sign in _LOST):
            raise
        logger.error(
            "process %d of %d: another process of this job is gone (%s); run the same command again to resume",
            jax.process_index(),
            jax.process_count(),
            printable(text.splitlines()[0]),
        )
        os._exit(1)


def _number(variable: str, argument: int | None) -> int | None:
    """Returns `argument`, or the environment variable where it is None."""
    text = os.environ.get(variable)
    if argument is not None or text is None:
        return argument
    if not text.isdecimal():
        raise InputError(f"{variable} is {text!r}; give a number")
    return int(text)
