"""What every host asks before anything is loaded or compiled: a pod that waits costs as much as one that works."""

import contextlib
import os
import pathlib
import socket
import tempfile
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from data_pipelines import mixtures
from data_pipelines.mixture_dataset import require_present
from vl3_jax.checkpoint import open_source
from vl3_jax.checkpoint.paths import check_bucket, is_url, list_dir, translate_io_errors
from vl3_jax.errors import InputError

_PROBE = ".vl3-probe"
_LENGTH = 1000  # bytes of a host's answer


def check(config: ConfigDict, workdir: epath.Path) -> None:
    """Devices, workdir, start and data; every host must call this.

    Raises:
      InputError: on all hosts alike, naming the first that finds fault and what it is, so that all of them end.
    """
    _devices(config.expect_devices)
    if jax.process_count() == 1:
        _writable(workdir)
        return  # a start and data that cannot be read are found in a moment, and nobody waits
    first = jax.process_index() == 0
    probe = workdir / _PROBE
    run_on_all_hosts(lambda: _made(probe) if first else None)
    try:
        run_on_all_hosts(lambda: None if first else _seen(probe))
    finally:
        # Gone before any host looks into the workdir: they meet once more below.
        if first:
            with translate_io_errors(workdir):
                probe.unlink(missing_ok=True)
    run_on_all_hosts(lambda: _readable(config))


def run_on_all_hosts(step: Callable[[], None]) -> None:
    """Runs `step` on every host and waits for all; InputError on all of them when it fails on any."""
    try:
        step()
        mine = ""
    except InputError as error:
        mine = str(error)
    except OSError as error:
        mine = f"{type(error).__name__}: {error}"
    answers = _gathered(mine)
    for rank, answer in enumerate(answers):
        if answer:
            name, _, text = answer.partition("\n")
            raise InputError(f"host {rank} ({name}): {text}")


def _gathered(text: str) -> list[str]:
    """What every process says; "" from those without complaint."""
    said = f"{socket.gethostname()}\n{text}".encode()[:_LENGTH] if text else b""
    padded = np.zeros(_LENGTH, np.uint8)
    padded[: len(said)] = np.frombuffer(said, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, _LENGTH)
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]


def _devices(expected: int) -> None:
    """All hosts see the same devices, so all of them raise."""
    found = jax.devices()
    if not expected or len(found) == expected:
        return
    held = [sum(one.process_index == rank for one in found) for rank in range(jax.process_count())]
    raise InputError(
        f"{len(found)} devices ({found[0].device_kind}) where {expected} are expected; hosts 0 to {len(held) - 1} have "
        f"{', '.join(map(str, held))}; check the slice, or change --config.expect_devices"
    )


def _made(probe: epath.Path) -> None:
    """Writes a small file into the workdir."""
    check_bucket(probe.parent)
    with _writing(probe.parent), translate_io_errors(probe.parent):
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("a moment's trial of the workdir")


def _seen(probe: epath.Path) -> None:
    """Whether the workdir is that of the first host, and open to this one."""
    if probe.name not in list_dir(probe.parent):
        raise InputError(f"{probe.parent}: not the folder that the first host wrote to; all hosts need to share it")
    mine = probe.parent / f"{_PROBE}-{jax.process_index()}"
    with _writing(probe.parent), translate_io_errors(probe.parent):
        mine.write_text("")
        mine.unlink()


def _writable(workdir: epath.Path) -> None:
    """Of one process: the workdir, or the folder that it will be made in."""
    if is_url(workdir):
        _made(workdir / _PROBE)
        with translate_io_errors(workdir):
            (workdir / _PROBE).unlink()
        return
    folder = pathlib.Path(workdir)
    while not folder.exists():
        folder = folder.parent
    with _writing(workdir), tempfile.NamedTemporaryFile(dir=folder, prefix=_PROBE):
        pass


@contextlib.contextmanager
def _writing(folder: os.PathLike) -> Iterator[None]:
    """Turns what a local file system raises into one InputError."""
    try:
        yield
    except OSError as error:
        if is_url(folder):
            raise
        raise InputError(f"{folder}: cannot be written ({error.strerror}); give another --workdir") from None


def _readable(config: ConfigDict) -> None:
    """The start and the annotation files."""
    if config.init_from:
        open_source(config.init_from)
    require_present(mixtures.dataset_specs(config.data))
