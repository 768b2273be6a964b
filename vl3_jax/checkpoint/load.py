"""Reading a checkpoint of any kind onto the devices that will use it."""

import concurrent.futures
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vl3_jax.checkpoint import bundled
from vl3_jax.checkpoint.hf_source import open_hf
from vl3_jax.checkpoint.names import PARTS
from vl3_jax.checkpoint.orbax_tree import OrbaxSource, find_tree, nested, tree_key
from vl3_jax.checkpoint.orbax_write import WORKERS
from vl3_jax.checkpoint.progress import progress_bar
from vl3_jax.checkpoint.sources import CheckpointSource
from vl3_jax.checkpoint.tensors import float_dtype
from vl3_jax.errors import InputError
from vl3_jax.model.config import ModelConfig

if TYPE_CHECKING:
    import jax

_ALIGNMENT = 64  # of a NumPy buffer that the CPU backend takes over instead of copying


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model in memory.

    Attributes:
      params: nested dict of `jax.Array`, as `vl3_jax.model` takes it.
      config: its sizes.
      files: folder with config.json, tokenizer and processor files, as far as the checkpoint has them.
      kind: "orbax", "official", "official-train", "native", "qwen2", "siglip", "siglip-bare" or "navit".
      files_kind: the layout that `files/config.json` is in.
      source: keeps temporary copies of `files` alive.
    """

    params: dict[str, Any]
    config: ModelConfig
    files: pathlib.Path
    kind: str
    files_kind: str
    source: CheckpointSource


def open_source(
    source: str | os.PathLike, parts=PARTS, base: str | None = None, token: str | None = None
) -> CheckpointSource:
    """Opens an Orbax folder, training workdir or Hugging Face folder (disk or gs://), Hub id or "nano"; reads nothing.

    Raises:
      InputError: nothing there, or something that does not fit; one line.
    """
    source = bundled.resolve_bundled(source)
    if (tree := find_tree(source)) is not None:
        return OrbaxSource(source, tree)
    return open_hf(source, parts=parts, base=base, token=token)


def load(
    source: str | os.PathLike,
    *,
    dtype: Any = None,
    mesh: "jax.sharding.Mesh | None" = None,
    shardings: Any = None,
    base: str | None = None,
    token: str | None = None,
    quiet: bool = True,
    convert: Callable[[str, "jax.Array"], Any] | None = None,
) -> Checkpoint:
    """Restores a checkpoint to any mesh and dtype.

    Each shard is read, cast and transposed into the one buffer that then goes to its device: besides the model,
    the host holds a leaf or two at a time, and on the CPU the buffer itself becomes the array.

    Args:
      source: "nano", Orbax folder, training workdir, Hugging Face folder (any layout, read in place), gs://, Hub id.
      dtype: "bfloat16", "float16", "float32" (or the dtype); as stored by default.
      mesh: places the parameters by the rules of `vl3_jax.parallel.rules`.
      shardings: nested dict of shardings like the parameters, or one for all of them; wins over `mesh`.
      base, token: see `vl3_jax.checkpoint.open_hf`.
      quiet: no progress bar.
      convert: given each leaf's path and array as it arrives; what it returns takes the leaf's place.

    Raises:
      InputError: what `open_source` raises, or a damaged array; one line.
    """
    opened = open_source(source, base=base, token=token)
    return load_source(opened, dtype=dtype, mesh=mesh, shardings=shardings, quiet=quiet, convert=convert)


def load_source(
    opened: CheckpointSource,
    *,
    dtype: Any = None,
    mesh: Any = None,
    shardings: Any = None,
    quiet: bool = True,
    convert: Callable[[str, "jax.Array"], Any] | None = None,
) -> Checkpoint:
    """`load` for a source that is open already."""
    target = None if dtype is None else float_dtype(getattr(dtype, "name", None) or _dtype_name(dtype))
    dtypes = {path: target or opened.dtypes[path] for path in opened.leaves}
    placements = _placements(opened, mesh, shardings)
    total = sum(spec.size * dtypes[path].itemsize for path, spec in opened.leaves.items())
    arrays = {}
    with progress_bar(total, "load", quiet=quiet) as bar, concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        for path, spec in opened.leaves.items():
            array = _place(opened, path, spec.shape, dtypes[path], placements[path], pool)
            arrays[path] = array if convert is None else convert(path, array)
            bar.update(spec.size * dtypes[path].itemsize)
    return Checkpoint(nested(arrays), opened.config, opened.files, opened.kind, opened.files_kind, opened)


def _dtype_name(dtype: Any) -> str:
    return dtype if isinstance(dtype, str) else np.dtype(dtype).name


def _placements(source: CheckpointSource, mesh, shardings) -> dict[str, "jax.sharding.Sharding"]:
    import jax

    if shardings is None and mesh is not None:
        from vl3_jax.model import abstract_params, param_axes
        from vl3_jax.parallel import rules

        shardings = rules.shardings(abstract_params(source.config), param_axes(source.config), mesh)
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if not isinstance(shardings, Mapping):
        return dict.fromkeys(source.leaves, shardings)
    placements = {}
    for path in source.leaves:
        branch = shardings
        for key in tree_key(path):
            branch = branch.get(key) if isinstance(branch, Mapping) else None
        if branch is None:
            raise InputError(f"shardings: no entry for {path}; give one for each parameter")
        placements[path] = branch
    return placements


def _place(source: CheckpointSource, path: str, shape, dtype: np.dtype, sharding, pool) -> "jax.Array":
    """One leaf, read once for each distinct shard that this process holds."""
    import jax

    groups: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(tuple(shape)).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        groups.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in groups.items():
        buffer = _aligned([stop - start for start, stop in bounds], dtype)
        _read(source, path, bounds, buffer, pool)
        # Copies queue up behind the reads; waiting keeps at most one leaf on the host beside the device.
        shards += [jax.device_put(buffer, device) for device in devices]
        if devices[0].platform != "cpu":
            jax.block_until_ready(shards)
    return jax.make_array_from_single_device_arrays(tuple(shape), sharding, shards)


def _aligned(shape, dtype: np.dtype) -> np.ndarray:
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _read(source: CheckpointSource, path: str, bounds, buffer: np.ndarray, pool) -> None:
    """Fills `buffer` with the part `bounds` (start, stop of each axis) of a leaf."""
    stacked = source.leaves[path].stacked
    rest = tuple(slice(start, stop) for start, stop in (bounds[1:] if stacked else bounds))

    def read(layer: int | None) -> None:
        source.read(path, layer, rest, buffer if layer is None else buffer[layer - bounds[0][0]])

    layers = range(*bounds[0]) if stacked else [None]
    try:
        for done in [pool.submit(read, layer) for layer in layers]:
            done.result()
    except (ValueError, RuntimeError, OSError) as error:
        line = str(error).splitlines()[0]
        raise InputError(f"{source.location}: {path} cannot be read ({line}); convert or download it again") from None
