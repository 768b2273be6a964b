"""Parameter trees in Orbax folders: what `vl3 convert` writes and what a training run saves.

Arrays are opened with tensorstore, so that a slice, a shard or another dtype is read straight from the file; the
layout itself is Orbax's own (`_METADATA`, zarr or zarr3, with or without OCDBT).
"""

import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import tensorstore as ts

from vl3_jax.checkpoint.hf_config import from_dict, read_json, to_dict
from vl3_jax.checkpoint.names import PARTS, name_map
from vl3_jax.checkpoint.sources import Source
from vl3_jax.checkpoint.tensors import FLOATS
from vl3_jax.errors import InputError
from vl3_jax.model.config import ModelConfig

METADATA = "_METADATA"
MODEL_INFO = "vl3.json"  # sizes of the model and what its files are, beside `_METADATA` or in a folder above it
ASSETS = "assets"  # config.json, tokenizer and processor files, beside vl3.json
_ITEMS = ("params", "state", "default", "pytree")  # names under which a checkpoint manager keeps the tree


def find_tree(location: str | os.PathLike) -> pathlib.Path | None:
    """The folder with `_METADATA`: itself, an item of a step, or the newest step of a training workdir."""
    location = pathlib.Path(location)
    for folder in (location, *(location / item for item in _ITEMS)):
        if (folder / METADATA).is_file():
            return folder
    for parent in (location / "checkpoints", location):
        if not parent.is_dir():
            continue
        steps = sorted((int(entry.name), entry) for entry in parent.iterdir() if re.fullmatch(r"\d+", entry.name))
        for _, step in reversed(steps):
            if (found := find_tree(step)) is not None:
                return found
    return None


class OrbaxSource(Source):
    """The parameters in an Orbax folder; optimizer and other state beside them is not touched."""

    def __init__(self, location: str | os.PathLike):
        """Opens the folder and checks names, shapes and dtypes against the model's sizes.

        Raises:
          InputError: not a checkpoint of this package, or one whose arrays do not fit; one line.
        """
        self.kind, self.location = "orbax", os.fspath(location)
        tree = find_tree(location)
        if tree is None:
            raise InputError(f"{location}: no Orbax checkpoint in it (no {METADATA}); check the path")
        self.tree = tree.absolute()
        self.info_path = self._find_info()
        info = read_json(self.info_path)
        self.config = from_dict(info.get("config", {}), self.info_path)
        self.parts = tuple(info.get("parts", PARTS))
        self.files = self.info_path.parent / ASSETS
        self.files_kind = info.get("files_kind", "official")
        self.leaves = name_map("official", self.config, self.parts).leaves
        metadata = read_json(self.tree / METADATA)
        self._stores = self._open(metadata)
        self.dtypes = {path: store.dtype.numpy_dtype for path, store in self._stores.items()}

    def _find_info(self) -> pathlib.Path:
        for folder in (self.tree, *list(self.tree.parents)[:3]):
            if (folder / MODEL_INFO).is_file():
                return folder / MODEL_INFO
        raise InputError(f"{self.location}: an Orbax folder without {MODEL_INFO}, so the sizes are unknown; convert it")

    def _open(self, metadata: dict[str, Any]) -> dict[str, ts.TensorStore]:
        keys = self._param_keys(metadata)
        missing = [path for path in self.leaves if path not in keys]
        unexpected = [path for path in keys if path not in self.leaves]
        try:
            futures = {
                path: ts.open(self._spec(keys[path], metadata), read=True, open=True)
                for path in self.leaves
                if path in keys
            }
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
            f"{label}: {', '.join(found)}"
            for label, found in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("wrong shape", shapes),
                ("wrong dtype", dtypes),
            )
            if found
        ]
        if problems:
            raise InputError(f"{self.location}: the arrays do not fit {self.info_path.name}: {'; '.join(problems)}")
        return stores

    def _param_keys(self, metadata: dict[str, Any]) -> dict[str, tuple[str, ...]]:
        """Leaf path -> its key in the stored tree. The parameters are at the root or below a key `params`."""
        try:
            entries = metadata["tree_metadata"].values()
            every = [tuple(str(part["key"]) for part in entry["key_metadata"]) for entry in entries]
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{self.tree / METADATA}: not in the form that Orbax writes; restore it") from None
        roots = {key[: key.index("params") + 1] for key in every if "params" in key}
        roots = sorted(
            {root for root in roots if any(key[len(root) : len(root) + 1] == ("llm",) for key in every)} or [()]
        )
        root = min(roots, key=len)
        return {"/".join(key[len(root) :]): key for key in every if key[: len(root)] == root}

    def _spec(self, key: tuple[str, ...], metadata: dict[str, Any]) -> dict[str, Any]:
        name = ".".join(key)
        if (self.tree / "manifest.ocdbt").exists():
            kvstore = {"driver": "ocdbt", "base": f"file://{self.tree}", "path": f"{name}/"}
        else:
            kvstore = {"driver": "file", "path": f"{self.tree / name}/"}
        return {
            "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
            "kvstore": kvstore,
            # A chunk that is not there is a damaged checkpoint, not zeros.
            "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value", False),
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
        }

    def slice(self, leaf: str, layer: int | None) -> ts.TensorStore:
        """See `Source.slice`."""
        store = self._stores[leaf]
        return store if layer is None else store[layer]

    def stamps(self) -> list:
        """See `Source.stamps`."""
        paths = [self.tree / METADATA, self.info_path]
        return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def model_info(config: ModelConfig, parts: Sequence[str], files_kind: str) -> str:
    """The text of `vl3.json`."""
    content = {"format": 1, "config": to_dict(config), "parts": list(parts), "files_kind": files_kind}
    return json.dumps(content, indent=1) + "\n"


def tree_key(path: str) -> tuple[str, ...]:
    """`"llm/norm/scale"` -> `("llm", "norm", "scale")`."""
    return tuple(path.split("/"))


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """Leaves by path as the nested dict that the model takes."""
    root: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = tree_key(path)
        branch = root
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = leaf
    return root
