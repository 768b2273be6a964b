"""Reads parameter trees from Orbax folders, as `vl3 convert` writes them and training runs save them.

Arrays are opened with TensorStore, so that a slice or a shard is read directly from the file or object and cast on the
way. The layout is that of Orbax (`_METADATA`, zarr or zarr3, with or without OCDBT).
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import tensorstore as ts
from etils import epath

from vl3_jax.checkpoint.hf_config import from_dict
from vl3_jax.checkpoint.names import ALL_PARTS, LAYOUTS, AnyConfig, canonical_layout, name_map
from vl3_jax.checkpoint.sam2_hf_config import sam2_from_dict
from vl3_jax.checkpoint.sam2_names import SAM2_LAYOUTS
from vl3_jax.checkpoint.sidecar_files import download_sidecar_files, sidecar_fingerprints
from vl3_jax.checkpoint.sources import CheckpointSource, Origin, check_arrays
from vl3_jax.checkpoint.step_folders import METADATA
from vl3_jax.errors import InputError
from vl3_jax.json_file import JsonObject, read_object
from vl3_jax.sa2va.sa2va_config import Sa2vaConfig
from vl3_jax.storage.paths import (
    exists,
    file_fingerprints,
    is_url,
    kvstore,
    list_dir,
    translate_io_errors,
)

MODEL_INFO = "vl3.json"  # model configuration and layout of the assets, beside `_METADATA` or in a folder above it
ASSETS = "assets"  # folder with config.json, tokenizer and processor files, beside vl3.json
_ROOTS = (("llm",), ("trunk",))  # keys at the root of the parameters of VideoLLaMA3 and of SAM-2
_GCS_CACHE = {"cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}}  # for the inner nodes of OCDBT's B-trees
_GCS_COALESCING = {  # adjacent ranges of one OCDBT data file are read in one request
    "experimental_read_coalescing_threshold_bytes": 2**20,
    "experimental_read_coalescing_merged_bytes": 64 * 2**20,
    "experimental_read_coalescing_interval": "1ms",
}


class OrbaxSource(CheckpointSource):
    """Parameters in an Orbax folder; the optimizer state and other items are not read."""

    def __init__(self, location: str | os.PathLike, tree: epath.Path):
        """Opens the folder and checks names, shapes and dtypes against the model configuration.

        Args:
          location: Orbax folder or training workdir, for messages.
          tree: Folder with `_METADATA`, local or under gs://.

        Raises:
          InputError: The folder is not a checkpoint of this package, or its arrays do not fit its configuration.
        """
        self.kind, self.location, self.tree = "orbax", os.fspath(location), tree
        self.info_path = self._find_info()
        info = read_object(self.info_path, missing_ok=False)
        config = info.section("config")
        self.config = _parsed(config)
        self.parts = info.choices("parts", ALL_PARTS)
        assets = self.info_path.parent / ASSETS
        self.files = download_sidecar_files(self, assets, list_dir(assets)) if is_url(assets) else pathlib.Path(assets)
        self.files_kind = info.choice("files_kind", (*LAYOUTS, *SAM2_LAYOUTS), "official")
        self.origin = Origin.parse(info.get("origin"))
        self.leaves = name_map(canonical_layout(self.config), self.config, self.parts).leaves
        self._stores = self._open(read_object(self.tree / METADATA, missing_ok=False))
        self.dtypes = {path: store.dtype.numpy_dtype for path, store in self._stores.items()}

    def _find_info(self) -> epath.Path:
        min_parts = 3 if is_url(self.tree) else 1  # number of path components of a bucket or of a disk's root
        for folder in (self.tree, *list(self.tree.parents)[:3]):
            if len(folder.parts) >= min_parts and exists(folder / MODEL_INFO):
                return folder / MODEL_INFO
        raise InputError(
            f"{self.location}: an Orbax folder without {MODEL_INFO}, so the model configuration is unknown; convert it"
        )

    def _open(self, metadata: dict[str, Any]) -> dict[str, ts.TensorStore]:
        keys = self._param_keys(metadata)
        context = ts.Context(_GCS_CACHE if is_url(self.tree) else {})
        ocdbt = "manifest.ocdbt" in list_dir(self.tree)
        try:
            futures = {
                path: ts.open(self._spec(key, metadata, ocdbt), read=True, open=True, context=context)
                for path, key in keys.items()
                if path in self.leaves
            }
            with translate_io_errors(self.location):
                stores = {path: future.result() for path, future in futures.items()}
        except (ValueError, RuntimeError, OSError) as error:
            raise InputError(f"{self.tree}: an array is damaged ({str(error).splitlines()[0]}); restore it") from None
        unexpected = {path: ((), None) for path in keys if path not in self.leaves}
        check_arrays(
            f"{self.location}: the arrays do not fit {self.info_path.name}",
            {path: spec.shape for path, spec in self.leaves.items()},
            unexpected | {path: (tuple(store.shape), store.dtype.numpy_dtype) for path, store in stores.items()},
        )
        return stores

    def _param_keys(self, metadata: dict[str, Any]) -> dict[str, tuple[str, ...]]:
        """Returns the stored key of each leaf path. Parameters are at the root or below a key `params`."""
        try:
            entries = metadata["tree_metadata"].values()
            keys = [tuple(str(part["key"]) for part in entry["key_metadata"]) for entry in entries]
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{self.tree / METADATA}: not in the form that Orbax writes; restore it") from None
        roots = {key[: key.index("params") + 1] for key in keys if "params" in key}
        trees = [root for root in sorted(roots) if any(key[len(root) : len(root) + 1] in _ROOTS for key in keys)]
        root = min(trees, key=len, default=())
        return {"/".join(key[len(root) :]): key for key in keys if key[: len(root)] == root}

    def _spec(self, key: tuple[str, ...], metadata: dict[str, Any], ocdbt: bool) -> dict[str, Any]:
        name = ".".join(key)
        store = kvstore(self.tree / name)
        if ocdbt:
            store = {"driver": "ocdbt", "base": kvstore(self.tree), "path": f"{name}/"}
            if is_url(self.tree):
                store |= {"cache_pool": "cache_pool#ocdbt", **_GCS_COALESCING}
        return {
            "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
            "kvstore": store,
            # A missing chunk means that the checkpoint is damaged; it must not be read as zeros.
            "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value", False),
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
        }

    def slice(self, leaf: str, layer: int | None) -> ts.TensorStore:
        store = self._stores[leaf]
        return store if layer is None else store[layer]

    def split(self, leaf: str, layer: int | None) -> tuple[int, int]:
        return split_axis(self.slice(leaf, layer))

    def file_fingerprints(self) -> list:
        metadata = file_fingerprints([os.fspath(self.tree / METADATA), os.fspath(self.info_path)])
        return [*metadata, *sidecar_fingerprints(self.files)]


def split_axis(store: ts.TensorStore) -> tuple[int, int]:
    """Returns the axis along which an array, or a layer of one, is split into chunks, and their size along it."""
    chunk = store.chunk_layout.read_chunk.shape
    axis = next((axis for axis, size in enumerate(chunk) if size < store.shape[axis]), 0)
    return axis, chunk[axis]


def _parsed(values: JsonObject) -> AnyConfig:
    """Inverts `dataclasses.asdict` of the configuration of any model."""
    if "sam2" in values:
        return Sa2vaConfig(from_dict(values.section("chat")), sam2_from_dict(values.section("sam2")))
    return sam2_from_dict(values) if "hiera" in values else from_dict(values)


def model_info(config: AnyConfig, parts: Sequence[str], files_kind: str, origin: Origin | None = None) -> str:
    """Returns the content of `vl3.json`.

    Args:
      config: Model configuration.
      parts: Parts of the model that are stored; see `names.PARTS`.
      files_kind: Layout of the config.json in the assets.
      origin: Hugging Face model that the weights are those of.
    """
    content = {"format": 1, "config": dataclasses.asdict(config), "parts": list(parts), "files_kind": files_kind}
    if origin is not None:
        content["origin"] = dataclasses.asdict(origin)
    return json.dumps(content, indent=1) + "\n"
