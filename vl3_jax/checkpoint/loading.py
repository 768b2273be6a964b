"""Loads a checkpoint onto devices."""

import concurrent.futures
import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vl3_jax.checkpoint.opening import open_source
from vl3_jax.checkpoint.sources import CheckpointSource
from vl3_jax.checkpoint.tensors import float_dtype
from vl3_jax.checkpoint.tokenizer_files import check_token_ids
from vl3_jax.errors import InputError
from vl3_jax.model import abstract_params, param_axes
from vl3_jax.model.config import ModelConfig
from vl3_jax.parallel import rules
from vl3_jax.sam2.sam2_config import Sam2Config
from vl3_jax.sam2.sam2_model import abstract_sam2, sam2_axes
from vl3_jax.storage.jobs import WORKERS
from vl3_jax.storage.progress import progress_bar

_ALIGNMENT = 64  # bytes; the CPU backend uses a NumPy buffer of this alignment without copying it


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded model.

    Attributes:
      params: Nested dict of `jax.Array`, the parameters of `vl3_jax.model`, or of `vl3_jax.sam2`.
      config: Configuration of the model.
      files: Folder with config.json, tokenizer and processor files, as far as the checkpoint has them.
      source: The opened source, which owns temporary copies of `files`.
    """

    params: dict[str, Any]
    config: ModelConfig | Sam2Config
    files: pathlib.Path
    source: CheckpointSource


def load(
    source: str | os.PathLike | CheckpointSource,
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    shardings: Any = None,
    base: str | None = None,
    token: str | None = None,
    quiet: bool = True,
    convert: Callable[[str, jax.Array], Any] | None = None,
) -> Checkpoint:
    """Loads a checkpoint onto any mesh and in any dtype.

    Each shard is read, cast and transposed into a single buffer, which is then transferred to its device. Besides the
    model, the host holds one or two leaves at a time; on the CPU backend the buffer itself becomes the array.

    Args:
      source: Orbax folder, training workdir or Hugging Face folder (on a disk or under gs://), Hub id, or "nano"; or
        a source that is open already, to which `base` and `token` do not apply.
      dtype: "bfloat16", "float16", "float32" or the dtype itself; by default as stored.
      mesh: Mesh to shard the parameters over, by the rules of `vl3_jax.parallel.rules`.
      shardings: Nested dict of shardings with the structure of the parameters, or one sharding for all of them.
        Takes precedence over `mesh`.
      base: Base model of an adapter or of a projector-only run, in place of the one that its files name.
      token: Hub token.
      quiet: Whether to hide the progress bar.
      convert: Called with the path and array of each leaf once it is loaded; its result replaces the leaf.

    Raises:
      InputError: There is no checkpoint, its tensors do not fit its configuration, or an array is damaged.
    """
    opened = source if isinstance(source, CheckpointSource) else open_source(source, base=base, token=token)
    if "llm" in opened.parts:
        check_token_ids(opened.files, opened.config)
    target = None if dtype is None else float_dtype(dtype if isinstance(dtype, str) else np.dtype(dtype).name)
    dtypes = {path: target or opened.dtypes[path] for path in opened.leaves}
    leaf_shardings = _leaf_shardings(opened, mesh, shardings)
    total = sum(spec.size * dtypes[path].itemsize for path, spec in opened.leaves.items())
    arrays = {}
    with progress_bar(total, "load", quiet=quiet) as bar, concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        for path, spec in opened.leaves.items():
            array = _load_leaf(opened, path, spec.shape, dtypes[path], leaf_shardings[path], pool)
            arrays[path] = array if convert is None else convert(path, array)
            bar.update(spec.size * dtypes[path].itemsize)
    return Checkpoint(unflatten_dict(arrays, sep="/"), opened.config, opened.files, opened)


def _leaf_shardings(source: CheckpointSource, mesh, shardings) -> dict[str, jax.sharding.Sharding]:
    if shardings is None and mesh is not None:
        is_sam2 = isinstance(source.config, Sam2Config)
        shapes, axes = (abstract_sam2, sam2_axes) if is_sam2 else (abstract_params, param_axes)
        shardings = rules.shardings(shapes(source.config), axes(source.config), mesh)
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if not isinstance(shardings, Mapping):
        return dict.fromkeys(source.leaves, shardings)
    by_path = flatten_dict(shardings, sep="/")
    if missing := [path for path in source.leaves if path not in by_path]:
        raise InputError(f"shardings: no entry for {missing[0]}; give one for each parameter")
    return by_path


def _load_leaf(source: CheckpointSource, path: str, shape, dtype: np.dtype, sharding, pool) -> jax.Array:
    """Loads one leaf, reading each distinct shard that this process holds once."""

    @functools.cache
    def read(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        buffer = _aligned([stop - start for start, stop in bounds], dtype)
        _read(source, path, bounds, buffer, pool)
        return buffer

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        return read(tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True)))

    # Transfers are asynchronous; waiting keeps at most one leaf in host memory.
    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, shard))


def _aligned(shape, dtype: np.dtype) -> np.ndarray:
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _read(source: CheckpointSource, path: str, bounds, buffer: np.ndarray, pool) -> None:
    """Fills `buffer` with the region `bounds` ((start, stop) of each axis) of a leaf."""
    stacked = source.leaves[path].stacked
    region = tuple(slice(start, stop) for start, stop in (bounds[1:] if stacked else bounds))

    def read(layer: int | None) -> None:
        source.read(path, layer, region, buffer if layer is None else buffer[layer - bounds[0][0]])

    list(pool.map(read, range(*bounds[0]) if stacked else [None]))
