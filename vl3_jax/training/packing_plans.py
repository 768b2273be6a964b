"""The planned rows of a run, kept in its workdir.

To plan tens of millions of samples takes minutes, which a whole slice would wait for after each preemption.
"""

import io

import jax
import numpy as np
from etils import epath

from data_pipelines.mixture_dataset import MixtureDataset
from data_pipelines.packing import PackingPlan
from vl3_jax.checkpoint.paths import atomic_write, list_dir, translate_io_errors

ROWS = "rows"
_SUFFIX = ".npz"


def load_plan(mixture: MixtureDataset, workdir: epath.Path) -> None:
    """Gives the corpus what an earlier start of the run has planned."""
    folder = workdir / ROWS
    with translate_io_errors(folder):
        for name in list_dir(folder):
            if name.endswith(_SUFFIX):
                mixture.planned[name.removesuffix(_SUFFIX)] = _read(folder / name)


def save_plan(mixture: MixtureDataset, workdir: epath.Path) -> None:
    """Writes what the corpus has planned and the workdir lacks; the first process does, for all."""
    if jax.process_index():
        return
    folder = workdir / ROWS
    with translate_io_errors(folder):
        there = list_dir(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for key, rows in mixture.planned.items():
            if f"{key}{_SUFFIX}" not in there:
                atomic_write(folder / f"{key}{_SUFFIX}", _content(rows))


def _read(file: epath.Path) -> PackingPlan:
    with np.load(io.BytesIO(file.read_bytes())) as arrays:
        offsets = np.concatenate([[0], np.cumsum(arrays["counts"], dtype=np.int64)])
        return PackingPlan(offsets, arrays["samples"].astype(np.int64))


def _content(rows: PackingPlan) -> bytes:
    file = io.BytesIO()
    np.savez(file, counts=np.diff(rows.offsets).astype(np.int32), samples=rows.samples.astype(np.int32))
    return file.getvalue()
