"""Adapters as PEFT writes them: `adapter_model.safetensors` and `adapter_config.json`, to be read over their base."""

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
    """Writes the adapters of `params`, and what else was trained, as a PEFT folder.

    `vl3_jax.checkpoint.load(folder, base=...)` merges it; so does `peft`, with a base of the same layout.

    Args:
      folder: made if it is not there.
      params: tree with adapters, of one rank and alpha.
      config: sizes of the model.
      base: folder or Hub id of the model adapted, for whoever reads the folder.
      layout: whose tensor names are used, "official" or "native".
      whole: tree of bools like `params` (the optimizer's mask, say); plain leaves that are True were trained as they
        are and are stored whole.

    Raises:
      InputError: no adapters, or several ranks or scales.
    """
    leaves = name_map(layout, config).leaves
    adapters = _adapters(params)
    shapes = {(kernel.a.shape[-1], kernel.scale) for kernel in adapters.values()}
    if len(shapes) != 1:
        found = ", ".join(f"rank {rank} scale {scale}" for rank, scale in sorted(shapes)) or "none"
        raise InputError(f"{folder}: a PEFT folder holds adapters of one rank and alpha; found {found}")
    ((rank, scale),) = shapes
    tensors: dict[str, np.ndarray] = {}
    for path, kernel in adapters.items():
        tensors |= _pairs(leaves[path], *jax.device_get((kernel.a, kernel.b)))
    trained = (
        [path for path, learns in flatten(whole).items() if learns and path in leaves] if whole is not None else []
    )
    values, modules = flatten(params), set()
    for path in trained:
        found = _whole(leaves[path], jax.device_get(values[path]))
        tensors |= found
        modules |= {name.removeprefix(PREFIX).rsplit(".", 1)[0] for name in found}
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
        "modules_to_save": sorted(modules) or None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content, indent=2) + "\n")


def _adapters(params: Any) -> dict[str, LoraKernel]:
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: isinstance(node, LoraKernel))
    return {leaf_path(path): node for path, node in nodes if isinstance(node, LoraKernel)}


def _pairs(leaf: LeafSpec, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """The two tensors of each layer: A [rank, in], B [out, rank], as a torch Linear has its weight, [out, in]."""
    tensors = {}
    rank = a.shape[-1]
    for index, spec in enumerate(leaf.tensors):
        here_a, here_b = (a[index], b[index]) if leaf.stacked else (a, b)
        module = PREFIX + spec.name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(here_a.reshape(-1, rank).T)
        tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(here_b.reshape(rank, -1).T)
    return tensors


def _whole(leaf: LeafSpec, array: np.ndarray) -> dict[str, np.ndarray]:
    slices = array if leaf.stacked else [array]
    pairs = zip(leaf.tensors, slices, strict=True)
    return {PREFIX + spec.name: np.ascontiguousarray(spec.to_tensor(np.asarray(part))) for spec, part in pairs}


def _target_pattern(leaves: list[LeafSpec]) -> str:
    """The regular expression that PEFT matches whole module names with: these modules, of any layer."""
    modules = (leaf.tensors[0].name.removesuffix(".weight") for leaf in leaves)
    return "|".join(sorted(re.escape(module).replace(r"layers\.0\.", r"layers\.\d+\.") for module in modules))
