"""Writes a checkpoint as an ordinary Orbax PyTree folder, slice by slice.

Each leaf is one uncompressed zarr array with one or a few chunks for each layer. bfloat16 weights do not compress, an
uncompressed chunk is read at the speed of the disk, and reading a layer or a shard or resuming a piece touches whole
files only.
"""

import functools
import itertools
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping

import numpy as np
import tensorstore as ts

from vl3_jax.checkpoint.digests import (
    array_digest,
    chunk_checksums,
    is_checksums,
    slice_checksums,
    with_digests,
)
from vl3_jax.checkpoint.name_specs import LeafSpec
from vl3_jax.checkpoint.orbax_tree import ASSETS, MODEL_INFO, model_info, split_axis
from vl3_jax.checkpoint.sidecar_files import copy_sidecar_files
from vl3_jax.checkpoint.sources import CheckpointSource, chat_config
from vl3_jax.checkpoint.step_folders import COMMITTED, METADATA, STEP_METADATA
from vl3_jax.checkpoint.tensors import contains_nan
from vl3_jax.checkpoint.tokenizer_files import check_token_ids
from vl3_jax.errors import InputError
from vl3_jax.storage.jobs import BucketJob, Job, open_job, write_pieces
from vl3_jax.storage.paths import is_url, kvstore, list_dir, resolve

_CHUNK_BYTES = 8 * 2**20
# lm_head (D, V) is split over the vocabulary, so that blocks of its Hugging Face rows can be read too.
_CHUNK_AXIS = {"llm/lm_head/kernel": 1}
_ZARR_DTYPES = {"bfloat16": "bfloat16", "float16": "<f2", "float32": "<f4"}


def write_orbax(
    source: CheckpointSource,
    target: str | os.PathLike,
    dtype: np.dtype | None = None,
    quiet: bool = False,
) -> None:
    """Writes `source` as an Orbax folder, resuming an interrupted run of the same job.

    Args:
      source: Checkpoint of any kind.
      target: Folder that does not exist yet, local or under gs://.
      dtype: Type to store. By default each leaf keeps its own.
      quiet: Whether to hide the progress bar.

    Raises:
      InputError: `target` exists or is not writable, or its disk is too small.
    """
    if "llm" in source.parts:
        check_token_ids(source.files, chat_config(source))
    dtypes = {path: np.dtype(dtype or source.dtypes[path]) for path in source.leaves}
    options = {"to": "orbax", "dtype": str(dtype), "layout": 1}
    names = [*map(_array_name, source.leaves), ASSETS, MODEL_INFO, METADATA, COMMITTED, STEP_METADATA]
    with open_job(target, source.fingerprint(**options), names) as job:
        if job.finished:
            return
        source.log_casts(dtypes)
        chunk_files = functools.cache(lambda path: list_dir(job.folder / _array_name(path)))
        sizes = {
            (path, tensor.layer): tensor.size * dtypes[path].itemsize
            for path, spec in source.leaves.items()
            for tensor in spec.tensors
        }
        remaining = [
            (path, layer)
            for path, layer in sizes
            if not job.is_done((path, layer))
            or not _chunks_complete(chunk_files(path), source.leaves[path], layer, dtypes[path])
        ]
        job.check_space(sum(sizes[piece] for piece in remaining))
        _write_arrays(source, job, sizes, remaining, dtypes, quiet)
        _finish(source, job, _digests(source, job))
        source.check_unchanged(job.fingerprint, options)
        job.commit()


def _write_arrays(source: CheckpointSource, job: Job | BucketJob, sizes, remaining, dtypes, quiet: bool) -> None:
    specs = {path: _array_spec(job.folder, spec, dtypes[path]) for path, spec in source.leaves.items()}
    opened = {path: ts.open(spec, open=True, create=True) for path, spec in specs.items()}
    stores = {path: future.result() for path, future in opened.items()}
    nan_leaves = set()

    def store_of(path: str, layer: int | None) -> ts.TensorStore:
        return stores[path] if layer is None else stores[path][layer]

    def write(piece: tuple[str, int | None]) -> list[int]:
        path, layer = piece
        checksums, has_nan = _write_slice(source, path, layer, store_of(path, layer), dtypes[path])
        if has_nan:
            nan_leaves.add(path if layer is None else f"{path}[{layer}]")
        return checksums

    write_pieces(job, sizes, remaining, write, "convert", quiet)
    for path, layer in sizes:
        if not is_checksums(job.note((path, layer))):  # written by an earlier run to a bucket, which has no journal
            checksums = slice_checksums(source, path, layer, store_of(path, layer), dtypes[path])
            job.mark_done((path, layer), checksums)
    source.warn_nan(nan_leaves)


def _write_slice(
    source: CheckpointSource, path: str, layer: int | None, store: ts.TensorStore, dtype: np.dtype
) -> tuple[list[int], bool]:
    """Writes one layer of a stacked leaf, or one unstacked leaf, a few whole chunks at a time.

    Returns:
      The checksums of the chunks, and whether there is a NaN among the values.
    """
    (axis, chunk), checksums, has_nan = split_axis(store), [], False
    for region, block in source.read_blocks(path, layer, axis, chunk, dtype):
        has_nan |= contains_nan(block)
        checksums += chunk_checksums(block, axis, chunk)
        store[region].write(block, can_reference_source_data_indefinitely=True).result()
    return checksums, has_nan


def _digests(source: CheckpointSource, job: Job | BucketJob) -> dict[str, str]:
    """Returns the digest of each array from the checksums that were recorded as its pieces were written."""
    return {
        path: array_digest(itertools.chain(*(job.note((path, tensor.layer)) for tensor in spec.tensors)))
        for path, spec in source.leaves.items()
    }


def _array_spec(folder: pathlib.PurePath, spec: LeafSpec, dtype: np.dtype) -> dict:
    return {
        "driver": "zarr",
        "kvstore": kvstore(folder / _array_name(spec.path)),
        "metadata": {
            "shape": list(spec.shape),
            "chunks": list(chunk_shape(spec, dtype)),
            "dtype": _ZARR_DTYPES[dtype.name],
            "compressor": None,
        },
        # Zeros are written like any other value, so that a missing chunk always means damage.
        "store_data_equal_to_fill_value": True,
    }


def _array_name(path: str) -> str:
    return path.replace("/", ".")


def chunk_shape(spec: LeafSpec, dtype: np.dtype) -> tuple[int, ...]:
    """Returns the chunk shape of a leaf: one layer, split along one axis into equal parts of at most 8 MiB."""
    shape = [1, *spec.shape[1:]] if spec.stacked else list(spec.shape)
    axis = _CHUNK_AXIS.get(spec.path, 1 if spec.stacked else 0)
    nbytes = math.prod(shape) * dtype.itemsize
    size = shape[axis]
    parts = next(n for n in range(1, size + 1) if size % n == 0 and (nbytes / n <= _CHUNK_BYTES or n == size))
    shape[axis] = size // parts
    return tuple(shape)


def _chunks_complete(file_sizes: Mapping[str, int], spec: LeafSpec, layer: int | None, dtype: np.dtype) -> bool:
    """Returns whether all chunks of a piece have their full size in `file_sizes`, the sizes of an array's files."""
    chunk = chunk_shape(spec, dtype)
    grid = [size // step for size, step in zip(spec.shape, chunk, strict=True)]
    nbytes = math.prod(chunk) * dtype.itemsize
    indices = (index for index in np.ndindex(*grid) if layer is None or index[0] == layer)
    return all(file_sizes.get(".".join(map(str, index))) == nbytes for index in indices)


def _finish(source: CheckpointSource, job: Job | BucketJob, digests: Mapping[str, str]) -> None:
    """Writes the sidecar files and the metadata; `_METADATA`, which makes the folder a checkpoint, comes last."""
    tree = {
        "tree_metadata": {
            str(tuple(path.split("/"))): {
                "key_metadata": [{"key": part, "key_type": 2} for part in path.split("/")],  # 2 = key of a dict
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False, "write_shape": spec.shape},
            }
            for path, spec in source.leaves.items()
        },
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
    files = {STEP_METADATA: json.dumps(step).encode(), METADATA: json.dumps(tree).encode()}
    assets = copy_sidecar_files(source.files, job.folder / ASSETS)
    arrays = [f"{_array_name(path)}/.zarray" for path in source.leaves]
    small = {name: (job.folder / name).read_bytes() for name in (*(f"{ASSETS}/{name}" for name in assets), *arrays)}
    info = model_info(source.config, source.parts, source.files_kind, source.origin)
    (job.folder / MODEL_INFO).write_text(with_digests(info, digests, small | files))
    (job.folder / COMMITTED).write_text("")
    for name, content in files.items():
        (job.folder / name).write_bytes(content)


def write_model_info(folder: str | os.PathLike, source: CheckpointSource) -> None:
    """Writes `vl3.json` and the sidecar files of `source` to `folder`, such as a training workdir.

    Orbax checkpoints below the folder can then be read by `vl3_jax.load` and by every `vl3` command.

    Args:
      folder: Existing folder, local or under gs://.
      source: Checkpoint whose configuration and files are written.

    Raises:
      InputError: The folder does not exist.
    """
    folder = resolve(folder)
    if not is_url(folder) and not folder.is_dir():
        raise InputError(f"{folder}: no such folder; create it first")
    copy_sidecar_files(source.files, folder / ASSETS)
    # Without an origin: the checkpoints below have other weights.
    (folder / MODEL_INFO).write_text(model_info(source.config, source.parts, source.files_kind))
