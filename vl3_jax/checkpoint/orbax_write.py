"""Writing a checkpoint as an ordinary Orbax PyTree folder, slice by slice.

One zarr array for each leaf, one chunk (or a few) for each layer, uncompressed: random bfloat16 does not compress,
a chunk is then read at the speed of the disk, and a layer, a shard or a resumed piece touches whole files only.
"""

import concurrent.futures
import functools
import json
import math
import os
import pathlib
import threading
import time
from collections.abc import Collection, Mapping

import numpy as np
import tensorstore as ts

from vl3_jax.checkpoint.jobs import BucketJob, Job, open_job, writing
from vl3_jax.checkpoint.names import LeafSpec
from vl3_jax.checkpoint.orbax_tree import ASSETS, COMMITTED, METADATA, MODEL_INFO, model_info, tree_key
from vl3_jax.checkpoint.paths import is_url, kvstore, list_dir, resolve
from vl3_jax.checkpoint.progress import note, progress_bar
from vl3_jax.checkpoint.sidecar_files import copy_sidecar_files
from vl3_jax.checkpoint.sources import CheckpointSource
from vl3_jax.checkpoint.transpose import scratch
from vl3_jax.errors import InputError

_CHUNK_BYTES = 8 * 2**20
_PIECE_BYTES = 16 * 2**20  # what one worker holds in memory at a time
# lm_head (D, V) is split over the vocabulary, so that its Hugging Face rows are read in pieces too.
_CHUNK_AXIS = {"llm/lm_head/kernel": 1}
_ZARR_DTYPES = {"bfloat16": "bfloat16", "float16": "<f2", "float32": "<f4"}
WORKERS = max(2, min(4, os.cpu_count() or 2))


def write_orbax(
    source: CheckpointSource,
    target: str | os.PathLike,
    dtype: np.dtype | None = None,
    quiet: bool = False,
) -> None:
    """Writes `source` as an Orbax folder at `target`, resuming an interrupted run of the same job.

    Args:
      source: any checkpoint.
      target: a folder that does not exist yet, local or under gs://.
      dtype: type to store; each leaf keeps its own by default.
      quiet: no progress bar.

    Raises:
      InputError: `target` is taken or forbidden, or its disk is too small.
    """
    dtypes = {path: np.dtype(dtype or source.dtypes[path]) for path in source.leaves}
    with open_job(target, source.fingerprint(to="orbax", dtype=str(dtype), layout=1)) as job:
        if job.finished:
            note(f"{job.target} is complete already")
            return
        report_casts(source, dtypes)
        pieces = [(path, tensor.layer) for path, spec in source.leaves.items() for tensor in spec.tensors]
        found = functools.cache(lambda path: list_dir(job.folder / _array_name(path)))
        left = [
            (path, layer)
            for path, layer in pieces
            if not job.is_done((path, layer))
            or not _chunks_there(found(path), source.leaves[path], layer, dtypes[path])
        ]
        sizes = {(p, layer): _slice_size(source.leaves[p], layer) * dtypes[p].itemsize for p, layer in pieces}
        job.check_space(sum(sizes[piece] for piece in left))
        total = sum(sizes.values())
        with (
            writing(job.target),
            progress_bar(total, "convert", total - sum(sizes[p] for p in left), quiet) as bar,
        ):
            _write_pieces(source, job, left, dtypes, sizes, bar)
            _finish(source, job, dtypes)
        job.commit()


def report_casts(source: CheckpointSource, dtypes: dict[str, np.dtype]) -> None:
    """One line for each pair of dtypes that the job casts between."""
    casts: dict[tuple[str, str], int] = {}
    for path, target in dtypes.items():
        if source.dtypes[path] != target:
            pair = (source.dtypes[path].name, target.name)
            casts[pair] = casts.get(pair, 0) + 1
    for (before, after), count in casts.items():
        note(f"note: {count} of {len(dtypes)} leaves are cast from {before} to {after}")


def _write_pieces(source: CheckpointSource, job: Job | BucketJob, pieces, dtypes, sizes, bar) -> None:
    context = ts.Context({"file_io_sync": False})
    specs = {path: _array_spec(job.folder, spec, dtypes[path]) for path, spec in source.leaves.items()}
    opened = {path: ts.open(spec, open=True, create=True, context=context) for path, spec in specs.items()}
    stores = {path: future.result() for path, future in opened.items()}
    stop, nan_leaves = threading.Event(), set()

    def write(piece: tuple[str, int | None]) -> None:
        if stop.is_set():
            return
        path, layer = piece
        try:
            if source.has_nan(path, layer):
                nan_leaves.add(path if layer is None else f"{path}[{layer}]")
            _write_slice(source, path, layer, stores[path] if layer is None else stores[path][layer], dtypes[path])
            job.mark_done(piece)
            bar.update(sizes[piece])
        except BaseException:
            stop.set()
            raise

    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(write, piece) for piece in pieces]
        try:
            for future in futures:
                future.result()
        finally:
            stop.set()
    warn_nan(source.location, nan_leaves)


def _write_slice(
    source: CheckpointSource, path: str, layer: int | None, store: ts.TensorStore, dtype: np.dtype
) -> None:
    """One layer, or one unstacked leaf, a few whole chunks at a time."""
    axis = _CHUNK_AXIS.get(path, 0)
    chunk = store.chunk_layout.write_chunk.shape[axis]
    rows = store.shape[axis]
    step = max(chunk, _PIECE_BYTES // (store.size // rows * dtype.itemsize) // chunk * chunk)
    for start in range(0, rows, step):
        part = tuple(
            slice(start, min(start + step, size)) if i == axis else slice(0, size) for i, size in enumerate(store.shape)
        )
        buffer = scratch("leaf", tuple(region.stop - region.start for region in part), dtype)
        source.read(path, layer, part, buffer)
        store[part].write(buffer, can_reference_source_data_indefinitely=True).result()


def warn_nan(location: str, names: Collection[str]) -> None:
    """One line about the tensors that hold NaN, if any do."""
    if names:
        shown = ", ".join(sorted(names)[:8]) + (" ..." if len(names) > 8 else "")
        note(f"warning: {location}: NaN in {len(names)} of its tensors: {shown}")


def _array_spec(folder: pathlib.PurePath, spec: LeafSpec, dtype: np.dtype) -> dict:
    return {
        "driver": "zarr",
        "kvstore": kvstore(folder / _array_name(spec.path)),
        "metadata": {
            "shape": list(spec.shape),
            "chunks": list(chunk_shape(spec, dtype)),
            "dtype": _ZARR_DTYPES[dtype.name],
            "compressor": None,
            "fill_value": None,
            "order": "C",
            "dimension_separator": ".",
        },
        # Zeros are written like any other value: a chunk that is not there always means damage.
        "store_data_equal_to_fill_value": True,
    }


def _array_name(path: str) -> str:
    return ".".join(tree_key(path))


def chunk_shape(spec: LeafSpec, dtype: np.dtype) -> tuple[int, ...]:
    """One layer a chunk, cut along one axis into equal parts of at most 8 MiB where an axis allows it."""
    shape = [1, *spec.shape[1:]] if spec.stacked else list(spec.shape)
    axis = _CHUNK_AXIS.get(spec.path, 1 if spec.stacked else 0)
    nbytes = math.prod(shape) * dtype.itemsize
    size = shape[axis]
    parts = next(n for n in range(1, size + 1) if size % n == 0 and (nbytes / n <= _CHUNK_BYTES or n == size))
    shape[axis] = size // parts
    return tuple(shape)


def _slice_size(spec: LeafSpec, layer: int | None) -> int:
    return spec.size if layer is None else spec.size // spec.shape[0]


def _chunks_there(found: Mapping[str, int], spec: LeafSpec, layer: int | None, dtype: np.dtype) -> bool:
    """Whether all chunks of a piece are in `found`, the sizes of an array's files, with their full size."""
    chunk = chunk_shape(spec, dtype)
    grid = [size // step for size, step in zip(spec.shape, chunk, strict=True)]
    nbytes = math.prod(chunk) * dtype.itemsize
    for index in np.ndindex(*grid):
        if layer is not None and index[0] != layer:
            continue
        if found.get(".".join(map(str, index))) != nbytes:
            return False
    return True


def _finish(source: CheckpointSource, job: Job | BucketJob, dtypes: dict[str, np.dtype]) -> None:
    """Everything small; what makes the folder a checkpoint comes last."""
    copy_sidecar_files(source.files, job.folder / ASSETS)
    (job.folder / MODEL_INFO).write_text(model_info(source.config, source.parts, source.files_kind))
    entries = {}
    for path, spec in source.leaves.items():
        key = tree_key(path)
        entries[str(key)] = {
            "key_metadata": [{"key": part, "key_type": 2} for part in key],  # 2 = key of a dict
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False, "write_shape": list(spec.shape)},
        }
    tree = {
        "tree_metadata": entries,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    now = time.time_ns()
    step = {
        "item_handlers": "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler",
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now,
        "custom_metadata": {},
    }
    (job.folder / "_CHECKPOINT_METADATA").write_text(json.dumps(step))
    (job.folder / COMMITTED).write_text("")
    (job.folder / METADATA).write_text(json.dumps(tree))


def write_model_info(folder: str | os.PathLike, source: CheckpointSource) -> None:
    """Puts `vl3.json` and the carried files of `source` into `folder`, say a training workdir.

    Orbax checkpoints below it are then read by `vl3_jax.load`, `vl3 convert export` and the rest.
    """
    folder = resolve(folder)
    if not is_url(folder) and not folder.is_dir():
        raise InputError(f"{folder}: no such folder; create it first")
    copy_sidecar_files(source.files, folder / ASSETS)
    (folder / MODEL_INFO).write_text(model_info(source.config, source.parts, source.files_kind))
