"""Writes a checkpoint as a Hugging Face folder: safetensors in the official or the native layout, streamed."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from vl3_jax.checkpoint.name_specs import TensorSpec
from vl3_jax.checkpoint.names import name_map
from vl3_jax.checkpoint.sam2_hf_config import export_layout
from vl3_jax.checkpoint.sidecar_files import CONFIG, export_sam2_files, export_sidecar_files, with_sam2_section
from vl3_jax.checkpoint.sources import CheckpointSource, chat_config
from vl3_jax.checkpoint.tensors import SAFETENSORS_DTYPES, contains_nan, copy_view, scratch
from vl3_jax.errors import InputError
from vl3_jax.sa2va.sa2va_config import Sa2vaConfig
from vl3_jax.sam2.sam2_config import Sam2Config
from vl3_jax.storage.jobs import Job, open_job, write_pieces
from vl3_jax.storage.paths import is_url

SHARD_BYTES = 5 * 10**9
_INDEX = "model.safetensors.index.json"
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class FileShard:
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
      layout: "official" (remote code; Meta's names of SAM-2) or "native" (transformers).
      dtype: Type to store. By default each tensor keeps its own.
      quiet: Whether to hide the progress bar.
      shard_bytes: Maximum bytes of tensors in one file. A larger tensor gets a file of its own.

    Raises:
      InputError: `target` exists, its disk is too small, `source` is not a complete model, or its files are damaged.
    """
    if is_url(target):
        raise InputError(f"{target}: exports go to local folders; choose one and copy it to the bucket")
    if not source.complete:
        raise InputError(
            f"{source.location}: contains only {', '.join(source.parts)}, and an export needs a complete model; "
            "combine it with `vl3 convert init`"
        )
    chat_layout = layout
    if isinstance(source.config, Sam2Config):
        layout = export_layout(layout)
    elif isinstance(source.config, Sa2vaConfig):
        layout = f"sa2va-{layout}"
    dtypes = {path: np.dtype(dtype or source.dtypes[path]) for path in source.leaves}
    shards = plan_shards(list(name_map(layout, source.config).tensors.values()), dtypes, shard_bytes)
    options = {"to": layout, "dtype": str(dtype), "shard": shard_bytes}
    fingerprint = source.fingerprint(**options)
    if isinstance(source.config, Sam2Config):
        files = export_sam2_files(source.files, source.config, dtypes["no_memory"].name)
    else:
        stated_dtype = dtypes["llm/embed/embedding"].name
        config = chat_config(source)
        files = export_sidecar_files(source.files, source.files_kind, config, chat_layout, stated_dtype)
        if isinstance(source.config, Sa2vaConfig):
            files[CONFIG] = with_sam2_section(files.get(CONFIG, b"{}"), source.config.sam2)
    names = {*files, _INDEX, *(name for shard in shards for name in (shard.name, f"{shard.name}.partial"))}
    with open_job(target, fingerprint, names) as job:
        if job.finished:
            return
        source.log_casts(dtypes)
        for shard in shards:
            _allocate(job, shard)
        _write_shards(source, job, shards, dtypes, quiet)
        _finish(job, shards, files)
        source.check_unchanged(job.fingerprint, options)
        job.commit()


def plan_shards(tensors: Sequence[TensorSpec], dtypes: dict[str, np.dtype], shard_bytes: int) -> list[FileShard]:
    """Assigns the tensors to files in order, starting a new file when the next tensor would exceed `shard_bytes`.

    Args:
      tensors: Tensors to store.
      dtypes: Stored dtype of each leaf.
      shard_bytes: Maximum bytes of tensors in one file.
    """
    groups, group_bytes = [], 0
    for spec in tensors:
        nbytes = spec.size * dtypes[spec.leaf].itemsize
        if not groups or group_bytes + nbytes > shard_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(spec)
        group_bytes += nbytes
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return [
        _plan_shard(name, group, dtypes)
        for name, group in zip(names if count > 1 else ["model.safetensors"], groups, strict=True)
    ]


def _plan_shard(name: str, tensors: Sequence[TensorSpec], dtypes: dict[str, np.dtype]) -> FileShard:
    # Wide types first: every tensor is then aligned to its item size, as readers that map the file need it.
    tensors = sorted(tensors, key=lambda spec: -dtypes[spec.leaf].itemsize)
    ends = list(itertools.accumulate((spec.size * dtypes[spec.leaf].itemsize for spec in tensors), initial=0))
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    entries |= {
        spec.name: {"dtype": _DTYPE_NAMES[dtypes[spec.leaf]], "shape": spec.shape, "data_offsets": offsets}
        for spec, offsets in zip(tensors, itertools.pairwise(ends), strict=True)
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return FileShard(
        name, tuple(tensors), tuple(len(header) + end for end in ends[:-1]), header, len(header) + ends[-1]
    )


def _partial(job: Job, shard: FileShard) -> pathlib.Path:
    return job.folder / f"{shard.name}.partial"


def _allocate(job: Job, shard: FileShard) -> None:
    """Allocates the file at its full size to detect a full disk early; the file of an earlier run is kept."""
    path = _partial(job, shard)
    finished = job.folder / shard.name  # exists if the process was killed between two renames of `_finish`
    if finished.is_file():
        finished.rename(path)
    if path.is_file() and path.stat().st_size == shard.size:
        return
    job.forget([(spec.name,) for spec in shard.tensors])
    path.unlink(missing_ok=True)
    job.check_space(shard.size)
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, shard.size)
        except OSError:
            path.unlink()
            raise
        file.write(shard.header)


def _write_shards(source: CheckpointSource, job: Job, shards: Sequence[FileShard], dtypes, quiet: bool) -> None:
    nan_names = set()

    def write(key: tuple[str]) -> None:
        spec, file, offset = pieces[key]
        if _copy(source, spec, dtypes[spec.leaf], file, offset):
            nan_names.add(spec.name)
        os.fsync(file)

    with contextlib.ExitStack() as stack:
        pieces = {}
        for shard in shards:
            file = stack.enter_context(open(_partial(job, shard), "r+b", buffering=0)).fileno()
            pieces |= {(spec.name,): (spec, file, at) for spec, at in zip(shard.tensors, shard.offsets, strict=True)}
        sizes = {key: spec.size * dtypes[spec.leaf].itemsize for key, (spec, _, _) in pieces.items()}
        write_pieces(job, sizes, [key for key in pieces if not job.is_done(key)], write, "export", quiet)
    source.warn_nan(nan_names)


def _copy(source: CheckpointSource, spec: TensorSpec, dtype: np.dtype, file: int, offset: int) -> bool:
    """Copies one tensor from its leaf into the file, in blocks of rows where its rows are rows of the leaf.

    Returns:
      Whether the tensor contains NaN.
    """
    axis, has_nan = spec.row_axis(), False
    row_bytes = spec.size // spec.shape[0] * dtype.itemsize
    if axis is None:  # a single block
        axis, chunk = 0, spec.slice_shape[0]
    else:
        store = source.slice(spec.leaf, spec.layer)
        chunk = (store.chunk_layout.read_chunk.shape or store.shape)[axis] or spec.shape[0]
    for region, block in source.read_blocks(spec.leaf, spec.layer, axis, chunk, dtype):
        has_nan |= contains_nan(block)
        view = spec.to_tensor(block)
        if not view.flags.c_contiguous:
            buffer = scratch("tensor", view.shape, dtype)
            copy_view(buffer, view)
            view = buffer
        _pwrite(file, view, offset + region[axis].start * row_bytes)
    return has_nan


def _pwrite(file: int, array: np.ndarray, offset: int) -> None:
    view = memoryview(array.reshape(-1).view(np.uint8))
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _finish(job: Job, shards: Sequence[FileShard], files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (job.folder / name).write_bytes(content)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(shard.size - len(shard.header) for shard in shards)},
            "weight_map": {spec.name: shard.name for shard in shards for spec in shard.tensors},
        }
        (job.folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for shard in shards:
        _partial(job, shard).rename(job.folder / shard.name)
