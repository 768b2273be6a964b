"""Reads parameter trees from Orbax folders, as `vl3 convert` writes them and training runs save them.

Arrays are opened with TensorStore, so that a slice or a shard is read directly from the file or object and cast on the
way. The layout is that of Orbax (`_METADATA`, zarr or zarr3, with or without OCDBT).
"""

import json
import os
import pathlib
import re
from collections.abc import Collection, Sequence
from typing import Any

import tensorstore as ts
from etils import epath

from vl3_jax.checkpoint.hf_config import from_dict, read_json, to_dict
from vl3_jax.checkpoint.hf_files import HfFolder, file_fingerprints
from vl3_jax.checkpoint.names import PARTS, name_map
from vl3_jax.checkpoint.paths import exists, is_url, kvstore, list_dir, resolve, translate_io_errors
from vl3_jax.checkpoint.sources import CheckpointSource
from vl3_jax.checkpoint.tensors import FLOATS
from vl3_jax.errors import InputError
from vl3_jax.model.config import ModelConfig

METADATA = "_METADATA"
COMMITTED = "commit_success.txt"
MODEL_INFO = "vl3.json"  # model configuration and layout of the assets, beside `_METADATA` or in a folder above it
ASSETS = "assets"  # folder with config.json, tokenizer and processor files, beside vl3.json
_STEPS = "checkpoints"  # folder of a workdir that contains its steps
_ITEMS = ("params", "state", "default", "pytree")  # item names under which a checkpoint manager stores the tree
_GCS_CACHE = {"cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}}  # for the inner nodes of OCDBT's B-trees
_GCS_COALESCING = {  # adjacent ranges of one OCDBT data file are read in one request
    "experimental_read_coalescing_threshold_bytes": 2**20,
    "experimental_read_coalescing_merged_bytes": 64 * 2**20,
    "experimental_read_coalescing_interval": "1ms",
}


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
    folder = resolve(location)
    names = list_dir(folder)
    if (tree := _tree_in(folder, names)) is not None:
        return tree
    steps = list_dir(folder / _STEPS) if _STEPS in names else {}
    for parent, children in ((folder / _STEPS, steps), (folder, names)):
        for step in sorted((name for name in children if re.fullmatch(r"\d+", name)), key=int, reverse=True):
            files = list_dir(parent / step)
            # A local step is renamed to its number once complete; under gs:// this file marks it as complete.
            complete = COMMITTED in files or not is_url(folder)
            if complete and (tree := _tree_in(parent / step, files)) is not None:
                return tree
    return None


def _tree_in(folder: epath.Path, names: Collection[str]) -> epath.Path | None:
    """Returns `folder` or the item in it that contains `_METADATA`."""
    if METADATA in names:
        return folder
    return next((folder / item for item in _ITEMS if item in names and METADATA in list_dir(folder / item)), None)


class OrbaxSource(CheckpointSource):
    """Parameters in an Orbax folder; the optimizer state and other items are not read."""

    def __init__(self, location: str | os.PathLike, tree: epath.Path | None = None):
        """Opens the folder and checks names, shapes and dtypes against the model configuration.

        Args:
          location: Orbax folder or training workdir, local or under gs://.
          tree: Result of `find_tree` for `location`, if already known.

        Raises:
          InputError: The folder is not a checkpoint of this package, or its arrays do not fit its configuration.
        """
        self.kind, self.location = "orbax", os.fspath(location)
        tree = tree or find_tree(location)
        if tree is None:
            raise InputError(f"{location}: contains no Orbax checkpoint (no {METADATA}); check the path")
        self.tree = tree
        self.info_path = self._find_info()
        info = read_json(self.info_path)
        self.config = from_dict(info.get("config", {}), self.info_path)
        self.parts = tuple(info.get("parts", PARTS))
        self.files = self._local_files(self.info_path.parent / ASSETS)
        self.files_kind = info.get("files_kind", "official")
        self.leaves = name_map("official", self.config, self.parts).leaves
        metadata = read_json(self.tree / METADATA)
        self._stores = self._open(metadata)
        self.dtypes = {path: store.dtype.numpy_dtype for path, store in self._stores.items()}

    def _find_info(self) -> epath.Path:
        min_parts = 3 if is_url(self.tree) else 1  # number of path components of a bucket or of a disk's root
        for folder in (self.tree, *list(self.tree.parents)[:3]):
            if len(folder.parts) >= min_parts and exists(folder / MODEL_INFO):
                return folder / MODEL_INFO
        raise InputError(
            f"{self.location}: an Orbax folder without {MODEL_INFO}, so the model configuration is unknown; convert it"
        )

    def _local_files(self, assets: epath.Path) -> pathlib.Path:
        """Returns `assets`, or for a URL a temporary copy that lives as long as this source."""
        if not is_url(assets) or not exists(assets):
            return pathlib.Path(assets)
        self._copy = HfFolder(assets)
        return self._copy.local

    def _open(self, metadata: dict[str, Any]) -> dict[str, ts.TensorStore]:
        keys = self._param_keys(metadata)
        missing = [path for path in self.leaves if path not in keys]
        unexpected = [path for path in keys if path not in self.leaves]
        context = ts.Context(_GCS_CACHE if is_url(self.tree) else {})
        ocdbt = "manifest.ocdbt" in list_dir(self.tree)
        try:
            futures = {
                path: ts.open(self._spec(keys[path], metadata, ocdbt), read=True, open=True, context=context)
                for path in self.leaves
                if path in keys
            }
            with translate_io_errors(self.location):
                stores = {path: future.result() for path, future in futures.items()}
        except (ValueError, RuntimeError, OSError) as error:
            raise InputError(f"{self.tree}: an array is damaged ({str(error).splitlines()[0]}); restore it") from None
        shapes = [
            f"{path} {tuple(store.shape)} instead of {self.leaves[path].shape}"
            for path, store in stores.items()
            if tuple(store.shape) != self.leaves[path].shape
        ]
        floats = FLOATS.values()
        dtypes = [
            f"{path} {store.dtype.name}" for path, store in stores.items() if store.dtype.numpy_dtype not in floats
        ]
        problems = [
            f"{label}: {', '.join(paths)}"
            for label, paths in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("wrong shape", shapes),
                ("wrong dtype", dtypes),
            )
            if paths
        ]
        if problems:
            raise InputError(
                f"{self.location}: the arrays do not fit {self.info_path.name}: {'; '.join(problems)}; "
                "check that both belong to the same model"
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
        roots = sorted(
            {root for root in roots if any(key[len(root) : len(root) + 1] == ("llm",) for key in keys)} or [()]
        )
        root = min(roots, key=len)
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

    def file_fingerprints(self) -> list:
        return file_fingerprints([os.fspath(self.tree / METADATA), os.fspath(self.info_path)])


def model_info(config: ModelConfig, parts: Sequence[str], files_kind: str) -> str:
    """Returns the content of `vl3.json`.

    Args:
      config: Model configuration.
      parts: Parts of the model that are stored; see `names.PARTS`.
      files_kind: Layout of the config.json in the assets.
    """
    content = {"format": 1, "config": to_dict(config), "parts": list(parts), "files_kind": files_kind}
    return json.dumps(content, indent=1) + "\n"


def tree_key(path: str) -> tuple[str, ...]:
    """Splits `"llm/norm/scale"` into `("llm", "norm", "scale")`."""
    return tuple(path.split("/"))


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """Converts a dict of leaves by path to the nested dict of parameters."""
    root: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = tree_key(path)
        branch = root
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = leaf
    return root
