"""The planned rows of a run, kept in its workdir.

To plan tens of millions of samples takes minutes, which a whole slice would wait for after each preemption.
"""

import io

import jax
import numpy as np
from etils import epath

from data_pipelines.corpus import Corpus
from data_pipelines.planning import Rows
from vl3_jax.checkpoint.places import entries, reaching, write_whole

ROWS = "rows"
_SUFFIX = ".npz"


def recall_rows(corpus: Corpus, workdir: epath.Path) -> None:
    """Gives the corpus what an earlier start of the run has planned."""
    folder = workdir / ROWS
    with reaching(folder):
        for name in entries(folder):
            if name.endswith(_SUFFIX):
                corpus.planned[name.removesuffix(_SUFFIX)] = _read(folder / name)


def keep_rows(corpus: Corpus, workdir: epath.Path) -> None:
    """Writes what the corpus has planned and the workdir lacks; the first process does, for all."""
    if jax.process_index():
        return
    folder = workdir / ROWS
    with reaching(folder):
        there = entries(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for key, rows in corpus.planned.items():
            if f"{key}{_SUFFIX}" not in there:
                write_whole(folder / f"{key}{_SUFFIX}", _content(rows))


def _read(file: epath.Path) -> Rows:
    with np.load(io.BytesIO(file.read_bytes())) as arrays:
        offsets = np.concatenate([[0], np.cumsum(arrays["counts"], dtype=np.int64)])
        return Rows(offsets, arrays["samples"].astype(np.int64))


def _content(rows: Rows) -> bytes:
    file = io.BytesIO()
    np.savez(file, counts=np.diff(rows.offsets).astype(np.int32), samples=rows.samples.astype(np.int32))
    return file.getvalue()
