"""Writes the adapters of a run as a PEFT folder."""

import json
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save

from vl3_jax.checkpoint.hf_source import open_hf
from vl3_jax.checkpoint.hub import is_hub_id
from vl3_jax.checkpoint.name_specs import LeafSpec
from vl3_jax.checkpoint.names import name_map
from vl3_jax.checkpoint.peft_merge import ADAPTER_WEIGHTS, PREFIX
from vl3_jax.checkpoint.sidecar_files import ADAPTER_CONFIG
from vl3_jax.checkpoint.sources import Origin
from vl3_jax.errors import InputError
from vl3_jax.model.config import ModelConfig
from vl3_jax.model.linear import LoraKernel
from vl3_jax.storage.paths import is_url

LAYOUTS = ("official", "official-train", "native")  # of the models that adapters go with
_EMBEDDING, _HEAD = "llm/embed/embedding", "lm_head.weight"


def peft_base(
    location: str, config: ModelConfig, base: str | None, layout: str | None, origin: Origin | None
) -> Origin:
    """Decides which base a PEFT folder names, and after which layout its tensors are named.

    Args:
      location: The run, for error messages.
      config: Configuration of its model.
      base: Base that the user chose: folder or Hub id.
      layout: Layout that the user chose.
      origin: Hugging Face model that the run began from, if any.

    Raises:
      InputError: There is no such base, it does not fit, or its layout is not known or another than `layout`.
    """
    if base is None and (origin is None or origin.layout not in LAYOUTS or is_url(origin.name)):
        began = "no Hugging Face model" if origin is None else f"{origin.name}, which PEFT cannot load"
        raise InputError(
            f"{location}: began from {began}; export its start with `vl3 convert export`, and name that folder with "
            "--base"
        )
    name = origin.name if base is None else base
    if not os.path.isdir(name):
        if os.path.isabs(name) or not is_hub_id(name):
            raise InputError(f"{name}: no such folder, and no Hub id; name the base with --base")
        known = origin.layout if origin is not None and origin.name == name else layout
        if known is None:
            raise InputError(f"--base {name}: of which layout is it? Give --layout, too: {', '.join(LAYOUTS)}")
    else:
        model, name = open_hf(name), os.path.abspath(name)
        if model.origin is None or model.kind not in LAYOUTS or _shapes(model.config) != _shapes(config):
            raise InputError(f"{name}: not a complete model of the shape of {location}; name another base with --base")
        known = model.kind
    if layout not in (None, known):
        raise InputError(f"--layout {layout}: {name} has the layout {known}; name a base of that layout with --base")
    return Origin(name, known)


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: spec.shape for name, spec in name_map("official", config).tensors.items()}


def write_adapters(
    folder: str | os.PathLike,
    params: Any,
    config: ModelConfig,
    *,
    base: str,
    layout: str = "official",
    whole: Any = None,
    dtype: np.dtype | None = None,
) -> None:
    """Writes the adapters of `params`, and the modules that were trained whole, as a PEFT folder.

    `vl3_jax.checkpoint.load(folder, base=...)` merges the folder into its base; so does `peft`, with a base of the same
    layout.

    Args:
      folder: Folder to write; created if it does not exist.
      params: Tree with adapters, all of one rank and alpha.
      config: Configuration of the model.
      base: Folder or Hub id (`owner/name[@revision]`) of the adapted model.
      layout: Naming of the tensors, one of `LAYOUTS`: that of the base.
      whole: Tree of bools like `params`, such as the mask of the optimizer. Plain leaves that are True are stored whole
        (`modules_to_save` of PEFT).
      dtype: Type to store. By default each tensor keeps its own.

    Raises:
      InputError: There are no adapters, or several ranks or scales.
    """
    names = name_map(layout, config)
    leaves = names.leaves
    values = _flatten(params)
    adapters = {path: node for path, node in values.items() if isinstance(node, LoraKernel)}
    scales = {(kernel.a.shape[-1], kernel.scale) for kernel in adapters.values()}
    if len(scales) != 1:
        found = ", ".join(f"rank {rank} scale {scale}" for rank, scale in sorted(scales)) or "none"
        raise InputError(f"{folder}: a PEFT folder holds adapters of one rank and alpha; found {found}")
    ((rank, scale),) = scales
    tensors: dict[str, np.ndarray] = {}
    for path, kernel in adapters.items():
        tensors |= _adapter_tensors(leaves[path], *jax.device_get((kernel.a, kernel.b)))
    whole_tensors: dict[str, np.ndarray] = {}
    for path, is_whole in _flatten(whole).items():
        if is_whole and path not in adapters:
            whole_tensors |= _whole_tensors(leaves[path], jax.device_get(values[path]))
    if config.text.tie_word_embeddings and _EMBEDDING in values and _flatten(whole).get(_EMBEDDING):
        # PEFT trains copies of modules, which are tied no longer.
        whole_tensors[_HEAD] = whole_tensors[leaves[_EMBEDDING].tensor(None).name]
    # PEFT saves whole modules only. What is trained of others it loads into the base, or, where the module is adapted,
    # into the layer that the adapter wraps.
    adapted = {name.rpartition(".lora_")[0] for name in tensors}
    biases = {name for name in whole_tensors if _module(name) in adapted}
    partly = {_module(name) for name in names.tensors if name not in whole_tensors}
    saved = {_module(name) for name in whole_tensors} - partly
    tensors |= {
        name.replace(".bias", ".base_layer.bias") if name in biases else name: tensor
        for name, tensor in whole_tensors.items()
    }
    name, _, revision = base.partition("@") if is_hub_id(base) else (base, "", "")
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision or None,
        "r": rank,
        "lora_alpha": round(scale * rank, 9),
        "lora_dropout": 0.0,
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": _target_pattern([leaves[path] for path in adapters]),
        "modules_to_save": sorted(saved) or None,
    }
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {f"{PREFIX}{name}": np.ascontiguousarray(tensor, dtype) for name, tensor in tensors.items()}
    (folder / ADAPTER_WEIGHTS).write_bytes(save(stored, {"format": "pt"}))
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by path; an adapted kernel is one leaf."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, LoraKernel))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): node for path, node in nodes}


def _adapter_tensors(leaf: LeafSpec, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """Returns A [rank, in] and B [out, rank] of each layer, transposed like the weight of a torch Linear."""
    tensors, rank = {}, a.shape[-1]
    layers = zip(a, b, strict=True) if leaf.stacked else [(a, b)]
    for spec, (layer_a, layer_b) in zip(leaf.tensors, layers, strict=True):
        module, (rows, *columns) = spec.name.removesuffix(".weight"), spec.shape
        tensors[f"{module}.lora_A.weight"] = layer_a.reshape(-1, rank).T.reshape(rank, *columns)
        tensors[f"{module}.lora_B.weight"] = layer_b.reshape(rank, -1).T.reshape(rows, rank, *[1] * len(columns[1:]))
    return tensors


def _whole_tensors(leaf: LeafSpec, array: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the tensors of a leaf that was trained whole."""
    layers = array if leaf.stacked else [array]
    return {spec.name: spec.to_tensor(np.asarray(layer)) for spec, layer in zip(leaf.tensors, layers, strict=True)}


def _target_pattern(leaves: list[LeafSpec]) -> str:
    """Returns the regular expression for PEFT that matches the names of these modules in any layer."""
    modules = (leaf.tensors[0].name.removesuffix(".weight") for leaf in leaves)
    return "|".join(sorted(re.escape(module).replace(r"layers\.0\.", r"layers\.\d+\.") for module in modules))
