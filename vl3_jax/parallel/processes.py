"""Initialises `jax.distributed` from flags or from the environment, and ends a process whose others are gone."""

import contextlib
import itertools
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import jax

from vl3_jax.errors import InputError, printable
from vl3_jax.platforms import on_tpu_machine

logger = logging.getLogger(__name__)

LOST_SECONDS = 45.0  # a process that was not heard of for so long is gone, and all others end
_BEAT_SECONDS = 5.0
_ALIVE = "vl3/alive/"
# In the errors of collectives and of the coordination service where another process is gone.
_LOST = ("Gloo", "gloo", "NCCL", "closed by peer", "UNAVAILABLE", "heartbeat", "oordination service")
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
        _watch_others()
    elif num_processes is not None or process_id is not None:
        raise InputError("--processes and --process-id need --coordinator HOST:PORT")
    elif any(name in os.environ for name in _CLUSTERS) or on_tpu_machine():
        jax.distributed.initialize()
        _watch_others()


_failing = threading.Event()


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
    """Lets all processes of a job end where one of them fails; to be open while they work together.

    A process whose others are gone ends with one line and exit code 1, at once: all that Python and JAX do at the end
    of a process waits for the others. A process that fails itself is taken as gone by the others.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        _failing.set()
        if jax.process_count() > 1 and any(sign in str(error) for sign in _LOST):
            _end(jax.process_index(), printable(str(error).splitlines()[0]))
        raise
    except Exception:
        _failing.set()
        raise


def _watch_others() -> None:
    """Tells the other processes of a job that this one is alive, and ends it when one of them no longer does.

    JAX does so too, later and with the stack of its own thread instead of a line.
    """
    from jax._src import distributed  # there is no public way to the store of the coordinator

    state = distributed.global_state
    client, own = state.client, state.process_id
    if client is None or state.num_processes == 1:
        return

    def watch() -> None:
        heard: dict[str, tuple[str, float]] = {}
        for beat in itertools.count():
            if _failing.is_set():
                return
            try:
                client.key_value_set(f"{_ALIVE}{own}", str(beat), allow_overwrite=True)
                found = dict(client.key_value_dir_get(_ALIVE))
            except Exception:  # the coordinator is gone or has ended, of which JAX tells
                return
            now = time.monotonic()
            for key, value in found.items():
                if heard.get(key, ("", now))[0] != value:
                    heard[key] = value, now
                if now - heard[key][1] > LOST_SECONDS:
                    _end(own, f"process {key.rpartition('/')[2]} gave no sign of life for {LOST_SECONDS:.0f} s")
            time.sleep(_BEAT_SECONDS)

    threading.Thread(target=watch, name="watch-others", daemon=True).start()


def _end(own: int, cause: str) -> NoReturn:
    logger.error("process %d: another one of this job is gone (%s); run the same command again to resume", own, cause)
    os._exit(1)


def _number(variable: str, argument: int | None) -> int | None:
    """Returns `argument`, or the environment variable where it is None."""
    text = os.environ.get(variable)
    if argument is not None or text is None:
        return argument
    if not text.isdecimal():
        raise InputError(f"{variable} is {text!r}; give a number")
    return int(text)
