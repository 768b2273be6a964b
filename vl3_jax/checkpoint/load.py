"""Opens a checkpoint of any kind, and loads it onto devices."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from vl3_jax.checkpoint import hub
from vl3_jax.checkpoint.hf_source import open_hf
from vl3_jax.checkpoint.orbax_tree import COMMITTED, METADATA, OrbaxSource
from vl3_jax.checkpoint.sources import CheckpointSource
from vl3_jax.checkpoint.tensors import float_dtype
from vl3_jax.errors import InputError
from vl3_jax.model import abstract_params, param_axes
from vl3_jax.model.config import ModelConfig
from vl3_jax.parallel import rules
from vl3_jax.storage.jobs import WORKERS
from vl3_jax.storage.paths import is_url, list_dir, resolve
from vl3_jax.storage.progress import progress_bar

NANO = "nano"  # name of the model bundled with the package, in the official Hugging Face layout
NANO_FOLDER = pathlib.Path(__file__).parents[1] / NANO
_STEPS = "checkpoints"  # folder of a workdir that contains its steps
_ITEMS = ("params", "state", "default", "pytree")  # item names under which a checkpoint manager stores the tree
_ALIGNMENT = 64  # bytes; the CPU backend uses a NumPy buffer of this alignment without copying it


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded model.

    Attributes:
      params: Nested dict of `jax.Array`, the parameters of `vl3_jax.model`.
      config: Configuration of the model.
      files: Folder with config.json, tokenizer and processor files, as far as the checkpoint has them.
      source: The opened source, which owns temporary copies of `files`.
    """

    params: dict[str, Any]
    config: ModelConfig
    files: pathlib.Path
    source: CheckpointSource


def open_source(source: str | os.PathLike, base: str | None = None, token: str | None = None) -> CheckpointSource:
    """Opens a checkpoint of any kind without reading its arrays.

    Args:
      source: Orbax folder, training workdir or Hugging Face folder (on a disk or under gs://), Hub id, or "nano"
        (`./nano` is a user's folder).
      base: Base model of an adapter or of a projector-only run, in place of the one that its files name.
      token: Hub token.

    Raises:
      InputError: There is no checkpoint, or its tensors do not fit its configuration.
    """
    source = NANO_FOLDER if source == NANO else source
    tree = find_tree(source)
    return open_hf(source, base=base, token=token) if tree is None else OrbaxSource(source, tree)


@contextlib.contextmanager
def open_tokenizer(source: str | os.PathLike, token: str | None = None) -> Iterator[pathlib.Path]:
    """Yields a tokenizer.json or a local folder that holds one, for as long as the context is open.

    Args:
      source: A tokenizer.json, a folder that holds one, or whatever `open_source` takes. Of a Hub id no weights are
        downloaded.
      token: Hub token.

    Raises:
      InputError: There is no such file, folder or checkpoint.
    """
    path = pathlib.Path(source)
    if os.fspath(source) != NANO and not is_url(source):
        if path.is_file() or (path / "tokenizer.json").is_file():
            yield path
            return
        if not path.exists() and hub.is_hub_id(os.fspath(source)):
            yield hub.download(os.fspath(source), token, weights=False)
            return
    opened = open_source(source, token=token)
    yield opened.files


def find_tree(location: str | os.PathLike) -> epath.Path | None:
    """Finds the folder with `_METADATA`: `location`, an item of a step, or the newest step of a training workdir.

    Args:
      location: Local folder or one under gs://.

    Returns:
      None if there is no such folder, and for other URLs and Hub ids.

    Raises:
      InputError: A gs:// folder cannot be listed, or the clients for gs:// are not installed.
    """
    if is_url(location) and not os.fspath(location).startswith("gs://"):
        return None
    trees = (_tree_in(folder, names) for folder, names in _folders(resolve(location)))
    return next((tree for tree in trees if tree is not None), None)


def _folders(folder: epath.Path) -> Iterator[tuple[epath.Path, Collection[str]]]:
    """Yields the folders that may hold the tree with the names in them: `folder`, then its steps, newest first."""
    names = list_dir(folder)
    yield folder, names
    steps = list_dir(folder / _STEPS) if _STEPS in names else {}
    for parent, children in ((folder / _STEPS, steps), (folder, names)):
        for step in sorted((name for name in children if re.fullmatch(r"\d+", name)), key=int, reverse=True):
            files = list_dir(parent / step)
            # A local step is renamed to its number once complete; under gs:// this file marks it as complete.
            if COMMITTED in files or not is_url(folder):
                yield parent / step, files


def _tree_in(folder: epath.Path, names: Collection[str]) -> epath.Path | None:
    """Returns `folder` or the item in it that contains `_METADATA`."""
    if METADATA in names:
        return folder
    return next((folder / item for item in _ITEMS if item in names and METADATA in list_dir(folder / item)), None)


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
        shardings = rules.shardings(abstract_params(source.config), param_axes(source.config), mesh)
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

    try:
        list(pool.map(read, range(*bounds[0]) if stacked else [None]))
    except (ValueError, RuntimeError, OSError) as error:
        line = str(error).splitlines()[0]
        raise InputError(f"{source.location}: {path} cannot be read ({line}); convert or download it again") from None
