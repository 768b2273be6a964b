"""Checks of devices, workdir, initial weights and data before anything is loaded or compiled.

A pod that waits for one faulty host costs as much as one that works.
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

import jax
from etils import epath

from data_pipelines import mixtures
from data_pipelines.mixture_dataset import require_present
from vl3_jax.checkpoint import open_source
from vl3_jax.errors import InputError
from vl3_jax.storage.locks import Lock, hold
from vl3_jax.storage.paths import check_bucket, is_url, list_dir, translate_io_errors
from vl3_jax.training.all_hosts import run_on_all_hosts
from vl3_jax.training.data import held_out_specs
from vl3_jax.training.run_config import RunConfig

_PROBE = ".vl3-probe"


def check(config: RunConfig, workdir: epath.Path) -> None:
    """Checks devices, workdir, initial weights and data; every host must call this.

    Raises:
      InputError: Something is wrong on some host. Raised on all hosts alike, naming the first and what it found, so
        that all of them end.
    """
    _devices(config.expect_devices)
    if jax.process_count() == 1:
        _writable(workdir)
        require_present(held_out_specs(config))
        return  # weights and training data that cannot be read are found in a moment, and nobody waits
    first = jax.process_index() == 0
    probe = workdir / _PROBE
    run_on_all_hosts(lambda: _write_probe(probe) if first else None)
    try:
        run_on_all_hosts(lambda: None if first else _read_probe(probe))
    finally:
        # Removed before any host looks into the workdir: all of them synchronise once more below.
        if first:
            with translate_io_errors(workdir):
                probe.unlink(missing_ok=True)
    run_on_all_hosts(lambda: _readable(config))


def lock_workdir(workdir: epath.Path, stack: contextlib.ExitStack) -> Lock:
    """Makes this job the only one that writes the workdir, until `stack` ends; every host must call this.

    Returns:
      The lock; the first process holds it for all.

    Raises:
      InputError: Another job holds it. Raised on all hosts alike.
    """
    if jax.process_count() == 1:
        return stack.enter_context(hold(workdir))
    locks = [Lock()]
    first = jax.process_index() == 0
    run_on_all_hosts(lambda: locks.append(stack.enter_context(hold(workdir))) if first else None)
    return locks[-1]


def _devices(expected: int) -> None:
    """Compares the number of devices; all hosts see the same ones, so all of them raise."""
    found = jax.devices()
    if not expected or len(found) == expected:
        return
    per_host = [sum(device.process_index == rank for device in found) for rank in range(jax.process_count())]
    raise InputError(
        f"{len(found)} devices ({found[0].device_kind}) where {expected} are expected; hosts 0 to "
        f"{len(per_host) - 1} have {', '.join(map(str, per_host))}; check the slice, or change --config.expect_devices"
    )


def _write_probe(probe: epath.Path) -> None:
    """Writes a small file into the workdir."""
    check_bucket(probe.parent)
    with _writing(probe.parent):
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("a test whether the workdir can be written")


def _read_probe(probe: epath.Path) -> None:
    """Checks that the workdir is the one the first host wrote to, and that this host can write there."""
    if probe.name not in list_dir(probe.parent):
        raise InputError(f"{probe.parent}: not the folder that the first host wrote to; all hosts need to share it")
    own = probe.parent / f"{_PROBE}-{jax.process_index()}"
    with _writing(probe.parent):
        own.write_text("")
        own.unlink()


def _writable(workdir: epath.Path) -> None:
    """Checks, for a single process, that the workdir or the folder it will be made in can be written."""
    if is_url(workdir):
        _write_probe(workdir / _PROBE)
        with translate_io_errors(workdir):
            (workdir / _PROBE).unlink()
        return
    path = pathlib.Path(workdir)
    folder = next(filter(pathlib.Path.exists, (path, *path.parents)))
    with _writing(workdir), tempfile.NamedTemporaryFile(dir=folder, prefix=_PROBE):
        pass


@contextlib.contextmanager
def _writing(folder: os.PathLike) -> Iterator[None]:
    """Turns errors of a local file system, and those of the clients of a URL, into an InputError."""
    try:
        with translate_io_errors(folder):
            yield
    except OSError as error:
        if is_url(folder):
            raise
        raise InputError(f"{folder}: cannot be written ({error.strerror}); give another --workdir") from None


def _readable(config: RunConfig) -> None:
    """Checks that the initial weights and the annotation files can be read."""
    if config.init_from:
        open_source(config.init_from)
    require_present([*mixtures.dataset_specs(config.data), *held_out_specs(config)])
