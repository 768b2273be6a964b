"""Several processes as one job: `jax.distributed` from the environment or from flags."""

import glob
import importlib.util
import os

import jax

from vl3_jax.errors import InputError

# Set by schedulers from which JAX can tell address, number and rank by itself: SLURM, Open MPI, TPU pods, indexed jobs
# of Kubernetes.
_CLUSTERS = (
    "SLURM_STEP_NODELIST",
    "OMPI_MCA_orte_hnp_uri",
    "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_ADDRESSES",
    "JOB_COMPLETION_INDEX",
)
_TPU_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")


def start(coordinator: str | None = None, processes: int | None = None, rank: int | None = None) -> None:
    """Joins the job's processes, before anything else touches a device.

    Args:
      coordinator: host:port of the first process; None asks the environment: JAX_COORDINATOR_ADDRESS with
        JAX_NUM_PROCESSES and JAX_PROCESS_ID, or a cluster that JAX knows. TPU machines need nothing.
      processes: how many, with `coordinator`.
      rank: of this one, from 0, with `coordinator`.

    Raises:
      InputError: settings that do not go together.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if coordinator:
        processes = _number("JAX_NUM_PROCESSES", processes)
        rank = _number("JAX_PROCESS_ID", rank)
        if processes is None or rank is None or not 0 <= rank < processes:
            raise InputError(
                f"process {rank} of {processes} with coordinator {coordinator}; give --processes N and --process-id "
                "0 ... N - 1"
            )
        jax.distributed.initialize(coordinator, processes, rank)
    elif processes is not None or rank is not None:
        raise InputError("--processes and --process-id need --coordinator HOST:PORT")
    elif any(name in os.environ for name in _CLUSTERS) or _on_tpu_machine():
        jax.distributed.initialize()


def _number(variable: str, given: int | None) -> int | None:
    text = os.environ.get(variable)
    if given is not None or text is None:
        return given
    if not text.isdecimal():
        raise InputError(f"{variable} is {text!r}; give a number")
    return int(text)


def _on_tpu_machine() -> bool:
    return importlib.util.find_spec("libtpu") is not None and any(map(glob.glob, _TPU_DEVICES))
