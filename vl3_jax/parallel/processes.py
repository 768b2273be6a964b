"""Initialises `jax.distributed` from flags or the environment, gathers, and ends a process whose others are gone."""

import contextlib
import itertools
import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from vl3_jax.errors import InputError, RunError, exit_code, printable
from vl3_jax.platforms import on_tpu_machine

logger = logging.getLogger(__name__)

LOST_SECONDS = 45.0  # a process that was not heard of for so long is gone, and all others end
_BEAT_SECONDS = 5.0
_ALIVE = "vl3/alive/"
_FATE = "vl3/fate/"  # of a process: that it failed, or ended because another one did
_FAILED, _ENDED = "failed", "ended"
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


def gathered(items: Sequence[Any]) -> list[Any]:
    """Returns the JSON values of all processes in their order; every process must call this."""
    if jax.process_count() == 1:
        return list(items)
    content = np.frombuffer(json.dumps(list(items)).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([len(content)]))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(content)] = content
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [item for row, size in zip(rows, sizes, strict=True) for item in json.loads(row[:size].tobytes())]


_failing = threading.Event()


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
    """Lets all processes of a job end where one of them fails; to be open while they work together.

    A process whose others are gone ends with one line and exit code 1, and one that fails alone tells the others and
    ends with its own line or traceback; both at once, as all that Python, JAX and Orbax do at the end of a process
    waits for the others. Where all fail alike, the error is raised.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1:
            if isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error) for sign in _LOST):
                _end(jax.process_index(), printable(str(error).splitlines()[0]))
            if not _all_fail():
                is_line = isinstance(error, InputError | RunError)
                logger.error("process %d: %s", jax.process_index(), error, exc_info=None if is_line else error)
                os._exit(exit_code(error))
        raise


def _all_fail() -> bool:
    """Tells the other processes that this one fails, and returns whether all of them do."""
    from jax._src import distributed

    _failing.set()
    state, found = distributed.global_state, {}
    client = state.client
    assert client is not None
    with contextlib.suppress(Exception):  # the coordinator is gone
        client.key_value_set(f"{_FATE}{state.process_id}", _FAILED)
        deadline = time.monotonic() + 3 * _BEAT_SECONDS
        while len(found) < state.num_processes and time.monotonic() < deadline:
            time.sleep(_BEAT_SECONDS / 50)
            found = dict(client.key_value_dir_get(_FATE))
    return [*found.values()].count(_FAILED) == state.num_processes


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
            with contextlib.suppress(Exception):  # the coordinator is slow, or gone, of which JAX tells
                client.key_value_set(f"{_ALIVE}{own}", str(beat), allow_overwrite=True)
                found, fates = (client.key_value_dir_get(folder) for folder in (_ALIVE, _FATE))
                for key, value in found:
                    if heard.get(key, ("", 0.0))[0] != value:
                        heard[key] = value, time.monotonic()
                silent = [key for key, (_, since) in heard.items() if time.monotonic() - since > LOST_SECONDS]
                failed = [key for key, fate in fates if fate == _FAILED]
                if failed and not _failing.wait(_BEAT_SECONDS / 2):  # where all fail alike, each says so itself
                    client.key_value_set(f"{_FATE}{own}", _ENDED)
                    if own == 0:
                        time.sleep(_BEAT_SECONDS)  # JAX kills the others when their coordinator ends
                    _end(own, f"process {_number_of(failed[0])} failed")
                if silent:
                    _end(own, f"process {_number_of(silent[0])} gave no sign of life for {LOST_SECONDS:.0f} s")
            time.sleep(_BEAT_SECONDS)

    threading.Thread(target=watch, name="watch-others", daemon=True).start()


def _number_of(key: str) -> str:
    return key.rpartition("/")[2]


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
