"""Loads a checkpoint onto devices."""

import concurrent.futures
import dataclasses
import functools
import heapq
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from vl3_jax.checkpoint.leaf_filling import Bounds, Leaf, Run, fill, fill_quantized
from vl3_jax.checkpoint.names import AnyConfig
from vl3_jax.checkpoint.opening import open_source
from vl3_jax.checkpoint.sources import CheckpointSource, chat_config
from vl3_jax.checkpoint.tensors import float_dtype, release_pages
from vl3_jax.checkpoint.tokenizer_files import check_token_ids
from vl3_jax.errors import InputError
from vl3_jax.model import abstract_params, param_axes
from vl3_jax.model.quantize import TIED_HEAD, QuantizedKernel, contracted_dimensions, outputs_first
from vl3_jax.model.serving_layout import EMBEDDING, Piece, serving_leaves
from vl3_jax.parallel import rules
from vl3_jax.sa2va.sa2va_config import Sa2vaConfig
from vl3_jax.sa2va.sa2va_model import abstract_sa2va, sa2va_axes
from vl3_jax.sam2.sam2_config import Sam2Config
from vl3_jax.sam2.sam2_model import abstract_sam2, sam2_axes
from vl3_jax.storage.jobs import MOST_WORKERS, WORKERS
from vl3_jax.storage.progress import progress_bar

# A stacked leaf of more bytes is put on an accelerator layer by layer: the host then holds one layer of it at a time.
LAYERWISE_BYTES = 256 * 2**20


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
    config: AnyConfig
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
    serving: bool = False,
    quantize: str | None = None,
) -> Checkpoint:
    """Loads a checkpoint onto any mesh and in any dtype.

    What is read is cast or quantised part by part and transposed into the buffer of its leaf, which is then transferred
    to its device. Besides the model, host and devices hold at most one layer of a stacked leaf, or a few other leaves;
    on the CPU backend the buffer itself becomes the array.

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
      serving: Whether to load the layout for serving (`vl3_jax.model.serving_layout`) in place of that of training; of
        a Sa2VA its language model. Embeddings that are stored in bfloat16 then stay so in a wider `dtype`: that changes
        no result.
      quantize: "int8" quantises the kernels (see `vl3_jax.model.quantize`); for serving only.

    Raises:
      InputError: There is no checkpoint, its tensors do not fit its configuration, or an array is damaged; a part of
        the model is missing that the layout for serving has; or `quantize` is not for serving.
    """
    opened = source if isinstance(source, CheckpointSource) else open_source(source, base=base, token=token)
    if "llm" in opened.parts:
        check_token_ids(opened.files, chat_config(opened))
    target = None if dtype is None else float_dtype(dtype if isinstance(dtype, str) else np.dtype(dtype).name)
    leaves = leaves_to_load(opened, target, serving, quantize)
    leaf_shardings = _leaf_shardings(opened, leaves, serving, mesh, shardings)
    arrays: dict[str, Any] = {}
    total = sum(leaf.nbytes for leaf in leaves)
    with progress_bar(total, "load", quiet=quiet) as bar, concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:

        def load_leaf(leaf: Leaf, run: Run) -> None:
            arrays[leaf.path] = _load_leaf(opened, leaf, leaf_shardings[leaf.path], run)
            release_pages()
            bar.update(leaf.nbytes)

        # The largest first, while there is most room beside them. The layers of a stacked leaf are read side by side,
        # and so are the others.
        list(pool.map(lambda leaf: load_leaf(leaf, map), [leaf for leaf in leaves if not leaf.stacked]))
        for leaf in leaves:
            if leaf.stacked:
                load_leaf(leaf, pool.map)
    return Checkpoint(unflatten_dict(arrays, sep="/"), opened.config, opened.files, opened)


def leaves_to_load(
    source: CheckpointSource, dtype: np.dtype | None = None, serving: bool = False, quantize: str | None = None
) -> list[Leaf]:
    """Returns the leaves that `load`, which describes the arguments, makes of a checkpoint, the largest first."""
    if not serving:
        if quantize:
            raise InputError(f"quantize is {quantize!r}: weights are quantised for serving only; add serving=True")
        leaves = [_leaf_of_training(source, path, dtype or source.dtypes[path]) for path in source.leaves]
    else:
        if not source.complete:
            parts = ", ".join(source.parts)
            raise InputError(f"{source.location}: holds only {parts}; make a whole model of it: vl3 convert init")
        leaves = []
        for path, leaf in serving_leaves(chat_config(source), quantize).items():
            stored = source.dtypes[leaf.pieces[0].path]
            kept = path == EMBEDDING and stored.name == "bfloat16"
            contracted = contracted_dimensions(path, len(leaf.shape)) if quantize else ()
            leaf_dtype = stored if kept else dtype or stored
            leaves.append(Leaf(path, leaf.shape, leaf_dtype, leaf.pieces, contracted, leaf.splits, leaf.transposed))
    return sorted(leaves, key=lambda leaf: -leaf.nbytes)


def most_on_host(sizes: Iterable[int]) -> int:
    """Returns the most bytes of a model for serving that a host with an accelerator holds at a time while it loads it.

    Each thread fills a leaf, and copies it to where it stays on its devices: there, nothing is needed besides.

    Args:
      sizes: Bytes of each leaf.
    """
    return sum(heapq.nlargest(MOST_WORKERS, sizes))


def _leaf_of_training(source: CheckpointSource, path: str, dtype: np.dtype) -> Leaf:
    spec = source.leaves[path]
    layers = range(spec.shape[0]) if spec.stacked else [None]
    pieces = tuple(Piece(path, layer, () if layer is None else (layer,)) for layer in layers)
    return Leaf(path, spec.shape, dtype, pieces)


def _leaf_shardings(source: CheckpointSource, leaves: list[Leaf], serving, mesh, shardings) -> dict[str, Sharding]:
    if shardings is None and mesh is not None:
        if isinstance(source.config, Sam2Config):
            abstract, axes = abstract_sam2(source.config), sam2_axes(source.config)
        elif isinstance(source.config, Sa2vaConfig) and not serving:
            abstract, axes = abstract_sa2va(source.config), sa2va_axes(source.config)
        else:
            config = chat_config(source)
            abstract, axes = abstract_params(config, serving=serving), param_axes(config, serving)
        shardings = rules.shardings(abstract, axes, mesh)
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if not isinstance(shardings, Mapping):
        return {leaf.path: shardings for leaf in leaves}
    by_path = flatten_dict(shardings, sep="/")
    if EMBEDDING in by_path:
        by_path.setdefault(TIED_HEAD, by_path[EMBEDDING])
    if missing := [leaf.path for leaf in leaves if leaf.path not in by_path]:
        raise InputError(f"shardings: no entry for {missing[0]}; give one for each parameter")
    return by_path


def _load_leaf(source: CheckpointSource, leaf: Leaf, sharding: Sharding, run: Run) -> jax.Array | QuantizedKernel:
    """Loads a leaf, reading each distinct shard that this process holds once; a quantised one is read whole."""
    if not is_layerwise(leaf, sharding):
        return _arrays(source, leaf, sharding, leaf.whole, run)
    stack = None
    for layer in range(leaf.shape[0]):
        part = _arrays(source, leaf, sharding, ((layer, layer + 1), *leaf.whole[1:]), run)
        if stack is None:
            stack = jnp.zeros(leaf.shape, part.dtype, device=part.sharding)
        stack = jax.block_until_ready(layer_setter(stack.sharding)(stack, part, layer))
    return stack  # pyright: ignore[reportReturnType]  # there is a layer


def is_layerwise(leaf: Leaf, sharding: Sharding) -> bool:
    """Returns whether a leaf is put on its devices layer by layer."""
    is_large = leaf.nbytes // sharding.num_devices * len(sharding.addressable_devices) > LAYERWISE_BYTES
    return leaf.stacked and is_large and {device.platform for device in sharding.device_set} != {"cpu"}


@functools.lru_cache
def layer_setter(sharding: Sharding) -> Any:
    """Returns the compiled function of a stacked array, an array of one layer, and its number, that sets the layer."""

    def set_layer(stack: jax.Array, part: jax.Array, layer: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(stack, part, layer, 0)

    return jax.jit(set_layer, donate_argnums=0, out_shardings=sharding)


def _arrays(source: CheckpointSource, leaf: Leaf, sharding: Sharding, bounds: Bounds, run: Run) -> Any:
    """Loads some layers of a leaf, or the whole leaf."""
    if leaf.contracted:
        values, scales = fill_quantized(source, leaf, run)
        order = outputs_first(values.ndim, leaf.contracted)
        outputs = order[: -len(leaf.contracted)]
        return QuantizedKernel(
            _array(values.shape, _reordered(sharding, order), lambda shard: values[_region(shard)]),
            _array(scales.shape, _reordered(sharding, outputs), lambda shard: scales[_region(shard)]),
        )
    first = [start for start, _ in bounds]

    @functools.cache
    def read(shard: Bounds) -> np.ndarray:
        part = [(start + offset, stop + offset) for offset, (start, stop) in zip(first, shard, strict=True)]
        return fill(source, leaf, part, run)

    return _array([stop - start for start, stop in bounds], sharding, read)


def _array(shape: Sequence[int], sharding: Sharding, read: Callable[[Bounds], np.ndarray]) -> jax.Array:
    """Makes an array of what `read` gives for the bounds of each shard."""

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        return read(tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True)))

    # Transfers are asynchronous; waiting keeps at most one leaf of each thread, or a layer of one, in host memory.
    return jax.block_until_ready(jax.make_array_from_callback(tuple(shape), sharding, shard))


def _region(bounds: Bounds) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in bounds)


def _reordered(sharding: Sharding, dimensions: Sequence[int]) -> Sharding:
    """Returns the sharding of an array that has these dimensions of the one that `sharding` is for."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    entries = dict(enumerate(sharding.spec))
    return NamedSharding(sharding.mesh, PartitionSpec(*(entries.get(axis) for axis in dimensions)))
