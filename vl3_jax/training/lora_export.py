"""Export of adapters as a PEFT folder: `adapter_model.safetensors` and `adapter_config.json`."""

import json
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from vl3_jax.checkpoint.names import LeafSpec, name_map
from vl3_jax.errors import InputError
from vl3_jax.model.config import ModelConfig
from vl3_jax.model.linear import LoraKernel
from vl3_jax.training.groups import flatten, leaf_path

PREFIX = "base_model.model."


def write_adapters(
    folder: str | os.PathLike,
    params: Any,
    config: ModelConfig,
    *,
    base: str,
    layout: str = "official",
    whole: Any = None,
) -> None:
    """Writes the adapters of `params`, and the modules that were trained whole, as a PEFT folder.

    `vl3_jax.checkpoint.load(folder, base=...)` merges the folder into its base; so does `peft`, with a base of the same
    layout.

    Args:
      folder: Folder to write; created if it does not exist.
      params: Tree with adapters, all of one rank and alpha.
      config: Configuration of the model.
      base: Folder or Hub id of the adapted model, stored as `base_model_name_or_path`.
      layout: Naming of the tensors, "official" or "native".
      whole: Tree of bools like `params`, such as the mask of the optimizer. Plain leaves that are True are stored whole
        (`modules_to_save` of PEFT).

    Raises:
      InputError: There are no adapters, or several ranks or scales.
    """
    leaves = name_map(layout, config).leaves
    adapters = _adapters(params)
    scales = {(kernel.a.shape[-1], kernel.scale) for kernel in adapters.values()}
    if len(scales) != 1:
        found = ", ".join(f"rank {rank} scale {scale}" for rank, scale in sorted(scales)) or "none"
        raise InputError(f"{folder}: a PEFT folder holds adapters of one rank and alpha; found {found}")
    ((rank, scale),) = scales
    tensors: dict[str, np.ndarray] = {}
    for path, kernel in adapters.items():
        tensors |= _adapter_tensors(leaves[path], *jax.device_get((kernel.a, kernel.b)))
    values, modules_to_save = flatten(params), set()
    for path, is_whole in {} if whole is None else flatten(whole).items():
        if is_whole and path in leaves:
            whole_tensors = _whole_tensors(leaves[path], jax.device_get(values[path]))
            tensors |= whole_tensors
            modules_to_save |= {name.removeprefix(PREFIX).rsplit(".", 1)[0] for name in whole_tensors}
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": round(scale * rank, 9),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": _target_pattern([leaves[path] for path in adapters]),
        "modules_to_save": sorted(modules_to_save) or None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content, indent=2) + "\n")


def _adapters(params: Any) -> dict[str, LoraKernel]:
    """Returns the adapted kernels by path."""
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: isinstance(node, LoraKernel))
    return {leaf_path(path): node for path, node in nodes if isinstance(node, LoraKernel)}


def _adapter_tensors(leaf: LeafSpec, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """Returns A [rank, in] and B [out, rank] of each layer, transposed like the weight of a torch Linear."""
    tensors = {}
    rank = a.shape[-1]
    for index, spec in enumerate(leaf.tensors):
        layer_a, layer_b = (a[index], b[index]) if leaf.stacked else (a, b)
        module = PREFIX + spec.name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(layer_a.reshape(-1, rank).T)
        tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(layer_b.reshape(rank, -1).T)
    return tensors


def _whole_tensors(leaf: LeafSpec, array: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the tensors of a leaf that was trained whole."""
    layers = array if leaf.stacked else [array]
    pairs = zip(leaf.tensors, layers, strict=True)
    return {PREFIX + spec.name: np.ascontiguousarray(spec.to_tensor(np.asarray(layer))) for spec, layer in pairs}


def _target_pattern(leaves: list[LeafSpec]) -> str:
    """Returns the regular expression for PEFT that matches the names of these modules in any layer."""
    modules = (leaf.tensors[0].name.removesuffix(".weight") for leaf in leaves)
    return "|".join(sorted(re.escape(module).replace(r"layers\.0\.", r"layers\.\d+\.") for module in modules))
