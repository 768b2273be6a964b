"""What all hosts of a run have to agree on before any of them goes on."""

import socket
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from vl3_jax.errors import InputError

_LENGTH = 1000  # bytes of a host's message


def run_on_all_hosts(step: Callable[[], None]) -> None:
    """Runs `step` on every host and waits for all; raises InputError on all of them when it fails on any.

    The message begins with the number and the name of the first host where there are several.
    """
    if jax.process_count() == 1:
        step()
        return
    try:
        step()
        message = ""
    except InputError as error:
        message = str(error)
    except OSError as error:
        message = f"{type(error).__name__}: {error}"
    rank, text = _first_message(f"({socket.gethostname()}): {message}" if message else "")
    if text:
        raise InputError(f"host {rank} {text}")


def agreed(message: str) -> str:
    """Returns the message of the first host that has one, on all hosts; an empty text if none has."""
    return message if jax.process_count() == 1 else _first_message(message)[1]


def from_first_host(compute: Callable[[], int]) -> int:
    """Returns on all hosts what `compute` gives on the first, a number of 32 bits."""
    number = -1

    def run() -> None:
        nonlocal number
        number = compute() if jax.process_index() == 0 else -1

    run_on_all_hosts(run)
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def _first_message(own: str) -> tuple[int, str]:
    """Returns the first message that is not empty, and the number of its host."""
    padded = np.frombuffer(own.encode()[:_LENGTH].ljust(_LENGTH, b"\0"), np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, _LENGTH)
    texts = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]
    return next(((rank, text) for rank, text in enumerate(texts) if text), (-1, ""))
