"""Writes a checkpoint as a Hugging Face folder: safetensors in the official or the native layout, streamed."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from vl3_jax.checkpoint.names import TensorSpec, name_map
from vl3_jax.checkpoint.sidecar_files import export_sidecar_files
from vl3_jax.checkpoint.sources import CheckpointSource
from vl3_jax.checkpoint.tensors import SAFETENSORS_DTYPES, contains_nan, copy_view, scratch
from vl3_jax.errors import InputError
from vl3_jax.storage.jobs import Job, write_pieces
from vl3_jax.storage.paths import translate_write_errors

SHARD_BYTES = 5 * 10**9
_PIECE_BYTES = 16 * 2**20  # larger tensors are copied in blocks of rows
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Shard:
    """Layout of one safetensors file.

    Attributes:
      name: File name.
      tensors: Tensors in file order.
      offsets: Byte offset of each tensor from the start of the file.
      header: Bytes before the first tensor: the header length and the header.
      size: Total size in bytes.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    header: bytes
    size: int


def write_hf(
    source: CheckpointSource,
    target: str | os.PathLike,
    layout: str,
    dtype: np.dtype | None = None,
    quiet: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `source` as a Hugging Face folder, resuming an interrupted run of the same job.

    Args:
      source: Complete model of any kind.
      target: Local folder that does not exist yet.
      layout: "official" (remote code) or "native" (transformers).
      dtype: Type to store. By default each tensor keeps its own.
      quiet: Whether to hide the progress bar.
      shard_bytes: Maximum bytes of tensors in one file. A larger tensor gets a file of its own.

    Raises:
      InputError: `target` exists, its disk is too small, or `source` is not a complete model.
    """
    if not source.complete:
        raise InputError(
            f"{source.location}: contains only {', '.join(source.parts)}, and an export needs a complete model; "
            "combine it with `vl3 convert init`"
        )
    names = name_map(layout, source.config)
    dtypes = {path: np.dtype(dtype or source.dtypes[path]) for path in source.leaves}
    shards = plan_shards(list(names.tensors.values()), dtypes, shard_bytes)
    with Job(target, source.fingerprint(to=layout, dtype=str(dtype), shard=shard_bytes)) as job:
        if job.finished:
            return
        source.log_casts(dtypes)
        for shard in shards:
            _allocate(job, shard)
        with translate_write_errors(job.target):
            _write_shards(source, job, shards, dtypes, quiet)
            _finish(source, job, shards, layout, dtypes)
        job.commit()


def plan_shards(tensors: Sequence[TensorSpec], dtypes: dict[str, np.dtype], shard_bytes: int) -> list[Shard]:
    """Assigns the tensors to files in order, starting a new file when the next tensor would exceed `shard_bytes`.

    Args:
      tensors: Tensors to store.
      dtypes: Stored dtype of each leaf.
      shard_bytes: Maximum bytes of tensors in one file.
    """
    groups: list[list[TensorSpec]] = [[]]
    group_bytes = 0
    for spec in tensors:
        nbytes = spec.size * dtypes[spec.leaf].itemsize
        if groups[-1] and group_bytes + nbytes > shard_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(spec)
        group_bytes += nbytes
    shards = []
    for number, group in enumerate(groups, start=1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        shards.append(_plan_shard(name, group, dtypes))
    return shards


def _plan_shard(name: str, tensors: Sequence[TensorSpec], dtypes: dict[str, np.dtype]) -> Shard:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    starts, end = [], 0
    # Wide types first: every tensor is then aligned to its item size, as readers that map the file need it.
    tensors = sorted(tensors, key=lambda spec: -dtypes[spec.leaf].itemsize)
    for spec in tensors:
        dtype = dtypes[spec.leaf]
        starts.append(end)
        end += spec.size * dtype.itemsize
        entries[spec.name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(spec.shape),
            "data_offsets": [starts[-1], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Shard(name, tuple(tensors), tuple(len(header) + start for start in starts), header, len(header) + end)


def _partial(job: Job, shard: Shard) -> pathlib.Path:
    return job.folder / f"{shard.name}.partial"


def _allocate(job: Job, shard: Shard) -> None:
    """Allocates the file at its full size to detect a full disk early; the file of an earlier run is kept."""
    path = _partial(job, shard)
    finished = job.folder / shard.name  # exists if the process was killed between two renames of `_finish`
    if finished.is_file():
        finished.rename(path)
    if path.is_file() and path.stat().st_size == shard.size:
        return
    for spec in shard.tensors:
        job.discard((spec.name,))
    path.unlink(missing_ok=True)
    job.check_space(shard.size)
    with translate_write_errors(job.target), open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, shard.size)
        except OSError as error:
            path.unlink()
            raise error
        file.write(shard.header)


def _write_shards(source: CheckpointSource, job: Job, shards: Sequence[Shard], dtypes, quiet: bool) -> None:
    files = {shard.name: os.open(_partial(job, shard), os.O_WRONLY) for shard in shards}
    pieces = {
        (spec.name,): (spec, files[shard.name], offset)
        for shard in shards
        for spec, offset in zip(shard.tensors, shard.offsets, strict=True)
    }
    sizes = {key: spec.size * dtypes[spec.leaf].itemsize for key, (spec, _, _) in pieces.items()}
    nan_names = set()

    def write(key: tuple[str]) -> None:
        spec, file, offset = pieces[key]
        if _copy(source, spec, dtypes[spec.leaf], file, offset):
            nan_names.add(spec.name)

    try:
        write_pieces(job, sizes, [key for key in pieces if not job.is_done(key)], write, "export", quiet)
    finally:
        for file in files.values():
            os.close(file)
    source.warn_nan(nan_names)


def _copy(source: CheckpointSource, spec: TensorSpec, dtype: np.dtype, file: int, offset: int) -> bool:
    """Copies one tensor from its leaf into the file, in blocks of rows if it is large.

    Returns:
      Whether the tensor contains NaN.
    """
    axis, has_nan = spec.row_axis(), False
    rows, row_bytes = spec.shape[0], spec.size // spec.shape[0] * dtype.itemsize
    step = rows
    if axis is not None and spec.size * dtype.itemsize > _PIECE_BYTES:
        # Blocks of whole chunks, so that each chunk is read once.
        store = source.slice(spec.leaf, spec.layer)
        chunk = (store.chunk_layout.read_chunk.shape or store.shape)[axis] or rows
        step = min(rows, max(chunk, _PIECE_BYTES // row_bytes // chunk * chunk))
    for start in range(0, rows, step):
        part = spec if step == rows else spec.rows(start, min(start + step, rows))
        region = [slice(0, size) for size in part.slice_shape]
        if axis is not None:
            region[axis] = slice(start, start + part.shape[0])
        leaf_slice = scratch("leaf", part.slice_shape, dtype)
        source.read(spec.leaf, spec.layer, tuple(region), leaf_slice)
        has_nan |= contains_nan(leaf_slice)
        view = part.to_tensor(leaf_slice)
        if not view.flags.c_contiguous:
            buffer = scratch("tensor", part.shape, dtype)
            copy_view(buffer, view)
            view = buffer
        _pwrite(file, view, offset + start * row_bytes)
    return has_nan


def _pwrite(file: int, array: np.ndarray, offset: int) -> None:
    view = memoryview(array.reshape(-1).view(np.uint8))
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _finish(
    source: CheckpointSource, job: Job, shards: Sequence[Shard], layout: str, dtypes: dict[str, np.dtype]
) -> None:
    dtype = dtypes["llm/embed/embedding"].name
    sidecar_files = export_sidecar_files(source.files, source.files_kind, source.config, layout, dtype)
    for name, content in sidecar_files.items():
        (job.folder / name).write_bytes(content)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(shard.size - len(shard.header) for shard in shards)},
            "weight_map": {spec.name: shard.name for shard in shards for spec in shard.tensors},
        }
        (job.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for shard in shards:
        _partial(job, shard).rename(job.folder / shard.name)
