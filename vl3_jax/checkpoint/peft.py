"""LoRA adapters as PEFT folders: merged into their base model while it is read, and written.

A folder has `adapter_config.json` and `adapter_model.safetensors`, with A [rank, in] and B [out, rank] of each adapted
module, and whole tensors of the modules that were trained whole.
"""

import json
import math
import os
import pathlib
import re
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vl3_jax.checkpoint.names import LeafSpec, name_map
from vl3_jax.checkpoint.sidecar_files import ADAPTER_CONFIG
from vl3_jax.checkpoint.sources import refuse_problems
from vl3_jax.checkpoint.tensors import TensorFiles
from vl3_jax.errors import InputError
from vl3_jax.json_file import JsonObject
from vl3_jax.model.config import ModelConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


class LoraMerged(TensorFiles):
    """Tensors of a base model with an adapter merged into them: `W + scale * B @ A`.

    Tensors without an adapter pair are those of the base. The sum is computed in float32 and rounded to the dtype of W
    once. Only the tensor being read is in memory.
    """

    def __init__(self, base: TensorFiles, adapter: TensorFiles, config: JsonObject, path: pathlib.Path):
        """Checks the adapter against its base.

        Args:
          base: Tensors of the base model.
          adapter: Tensors of the adapter under the names of the base, such as `NAME.lora_A.weight` for `NAME.weight`.
          config: Content of adapter_config.json.
          path: Path of adapter_config.json, for error messages.

        Raises:
          InputError: The adapter does not fit its base or uses an unsupported feature.
        """
        self._base, self._adapter, self._config, self._path = base, adapter, config, path
        if unsupported := [flag for flag in ("use_dora", "lora_bias") if config.get(flag)]:
            raise InputError(f"{path}: {', '.join(unsupported)} is not supported; merge the adapter with peft first")
        if config.get("peft_type", "LORA") != "LORA":
            raise InputError(f"{path}: peft_type {config['peft_type']!r} is not supported; only LORA is")
        self._pairs: dict[str, dict[str, str]] = {}  # names of A and B by weight
        self._whole = []
        for name in adapter:
            if match := re.fullmatch(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight", name):
                self._pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = name
            elif "lora_" in name:
                raise InputError(f"{adapter.infos[name].file}: {name} is not supported; merge the adapter with peft")
            else:
                self._whole.append(name)
        self.infos = dict(base.infos)
        self.paths = (*base.paths, *adapter.paths, str(path))
        self._check()

    def _check(self) -> None:
        expected, shapes = ({name: info.shape for name, info in files.infos.items()} for files in (self, self._adapter))
        unknown = [name for name in (*self._pairs, *self._whole) if name not in expected]
        incomplete = [name for name, pair in self._pairs.items() if len(pair) < 2]
        wrong_shape = []
        for name, pair in self._pairs.items():
            if name in unknown or name in incomplete:
                continue
            a, b = (shapes[pair[side]] for side in "AB")
            shape = expected[name][::-1] if self._config.get("fan_in_fan_out") else expected[name]
            if len(a) != 2 or len(b) != 2 or (b[0], a[1]) != shape or a[0] != b[1]:
                wrong_shape.append(f"{name} {b}x{a} for {shape}")
        wrong_shape += [
            f"{name} {shapes[name]} for {expected[name]}"
            for name in self._whole
            if name in expected and shapes[name] != expected[name]
        ]
        refuse_problems(
            f"{self._path}: the adapter does not fit its base",
            {"not in the base": unknown, "incomplete pair": incomplete, "wrong shape": wrong_shape},
            "check the base",
        )

    def _scale(self, weight: str, rank: int) -> float:
        """Returns the factor of B @ A. The first pattern that matches the module, or its end after a dot, counts."""
        module, patterns = weight.removesuffix(".weight"), self._config.section("alpha_pattern")
        alphas = (patterns.number(key, rank) for key in patterns if re.fullmatch(rf"(.*\.)?({key})", module))
        alpha = next(alphas, self._config.number("lora_alpha", rank))
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def array(self, name: str) -> np.ndarray:
        if name in self._whole:
            return self._adapter.array(name).astype(self.infos[name].dtype)
        base = self._base.array(name)
        if name not in self._pairs:
            return base
        a, b = (self._adapter.array(self._pairs[name][side]).astype(np.float32) for side in "AB")
        delta = (b * np.float32(self._scale(name, a.shape[0]))) @ a
        if self._config.get("fan_in_fan_out"):
            delta = delta.T
        # Blocks of rows, so that besides the result only `delta` has the size of the tensor.
        merged = np.empty(base.shape, base.dtype)
        for start in range(0, len(base), 1024):
            rows = slice(start, start + 1024)
            merged[rows] = (base[rows].astype(np.float32) + delta[rows]).astype(base.dtype)
        return merged


def strip_wrappers(name: str) -> str:
    """Removes the prefixes and infixes that PEFT and the official trainer add to a tensor name."""
    name = re.sub(r"^base_model\.(model\.)?", "", name)
    name = re.sub(r"^(model\.)+(?=model\.)", "", name)
    return re.sub(r"\.(modules_to_save(\.default)?|base_layer|original_module)\.", ".", name)


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
    import jax  # only here: reading adapters does without it

    from vl3_jax.model.linear import LoraKernel

    leaves = name_map(layout, config).leaves
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
        if is_whole and path not in adapters and path in leaves:
            whole_tensors |= _whole_tensors(leaves[path], jax.device_get(values[path]))
    modules_to_save = {name.removeprefix(_PREFIX).rsplit(".", 1)[0] for name in whole_tensors}
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors | whole_tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
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
    (folder / ADAPTER_CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def _flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by path; an adapted kernel is one leaf."""
    import jax

    from vl3_jax.model.linear import LoraKernel

    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, LoraKernel))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): node for path, node in nodes}


def _adapter_tensors(leaf: LeafSpec, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """Returns A [rank, in] and B [out, rank] of each layer, transposed like the weight of a torch Linear."""
    tensors, rank = {}, a.shape[-1]
    layers = zip(a, b, strict=True) if leaf.stacked else [(a, b)]
    for spec, (layer_a, layer_b) in zip(leaf.tensors, layers, strict=True):
        module = _PREFIX + spec.name.removesuffix(".weight")
        tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(layer_a.reshape(-1, rank).T)
        tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(layer_b.reshape(rank, -1).T)
    return tensors


def _whole_tensors(leaf: LeafSpec, array: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the tensors of a leaf that was trained whole."""
    layers = array if leaf.stacked else [array]
    pairs = zip(leaf.tensors, layers, strict=True)
    return {_PREFIX + spec.name: np.ascontiguousarray(spec.to_tensor(np.asarray(layer))) for spec, layer in pairs}


def _target_pattern(leaves: list[LeafSpec]) -> str:
    """Returns the regular expression for PEFT that matches the names of these modules in any layer."""
    modules = (leaf.tensors[0].name.removesuffix(".weight") for leaf in leaves)
    return "|".join(sorted(re.escape(module).replace(r"layers\.0\.", r"layers\.\d+\.") for module in modules))
