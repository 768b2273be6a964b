"""The packing plans of a run, kept in its workdir.

To plan tens of millions of samples takes minutes, which a whole slice would wait for after each preemption.
"""

import io

import jax
import numpy as np
from etils import epath

from data_pipelines.mixture_dataset import MixtureDataset
from data_pipelines.packing import PackingPlan
from vl3_jax.checkpoint.paths import atomic_write, list_dir, translate_io_errors

FOLDER = "rows"
_SUFFIX = ".npz"


def load_plans(mixture: MixtureDataset, workdir: epath.Path) -> None:
    """Gives the mixture the packing plans that an earlier start of the run has saved."""
    folder = workdir / FOLDER
    with translate_io_errors(folder):
        for name in list_dir(folder):
            if name.endswith(_SUFFIX):
                mixture.planned[name.removesuffix(_SUFFIX)] = _read(folder / name)


def save_plans(mixture: MixtureDataset, workdir: epath.Path) -> None:
    """Writes the packing plans that the workdir lacks; the first process does so for all."""
    if jax.process_index():
        return
    folder = workdir / FOLDER
    with translate_io_errors(folder):
        present = list_dir(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for key, plan in mixture.planned.items():
            if f"{key}{_SUFFIX}" not in present:
                atomic_write(folder / f"{key}{_SUFFIX}", _to_bytes(plan))


def _read(file: epath.Path) -> PackingPlan:
    with np.load(io.BytesIO(file.read_bytes())) as arrays:
        offsets = np.concatenate([[0], np.cumsum(arrays["counts"], dtype=np.int64)])
        return PackingPlan(offsets, arrays["samples"].astype(np.int64))


def _to_bytes(plan: PackingPlan) -> bytes:
    file = io.BytesIO()
    np.savez(file, counts=np.diff(plan.offsets).astype(np.int32), samples=plan.samples.astype(np.int32))
    return file.getvalue()
