"""Merges LoRA adapters (PEFT) into their base model while the base is read."""

import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vl3_jax.checkpoint.tensors import TensorFiles
from vl3_jax.errors import InputError


class LoraMerged(TensorFiles):
    """Tensors of a base model with an adapter merged into them: `W + scale * B @ A`.

    Tensors without an adapter pair are those of the base. The sum is computed in float32 and rounded to the dtype of W
    once. Only the tensor being read is in memory.
    """

    def __init__(self, base: TensorFiles, adapter: TensorFiles, config: Mapping[str, Any], path: pathlib.Path):
        """Checks the adapter against its base.

        Args:
          base: Tensors of the base model.
          adapter: Tensors of the adapter, with the names of the base after `strip_wrappers`.
          config: Content of adapter_config.json.
          path: Path of adapter_config.json, for error messages.

        Raises:
          InputError: The adapter does not fit its base or uses an unsupported feature.
        """
        self._base, self._adapter, self._config, self._path = base, adapter, config, path
        for flag in ("use_dora", "lora_bias"):
            if config.get(flag):
                raise InputError(f"{path}: {flag} is not supported; merge the adapter with peft first")
        if config.get("peft_type", "LORA") != "LORA":
            raise InputError(f"{path}: peft_type {config['peft_type']!r} is not supported; only LORA is")
        self._pairs, self._modules_to_save = self._sort(adapter)
        self.infos = dict(base.infos)
        self.paths = (*base.paths, *adapter.paths, str(path))
        self._check()

    def _sort(self, adapter: TensorFiles) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """Sorts adapter tensors into {weight: {"A": name, "B": name}} and, for fully saved modules, {weight: name}."""
        pairs: dict[str, dict[str, str]] = {}
        modules_to_save = {}
        for name in adapter:
            plain = strip_wrappers(name)
            match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight", plain)
            if match:
                pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = name
            elif "lora_" in plain:
                raise InputError(f"{adapter.infos[name].file}: {name} is not supported; merge the adapter with peft")
            else:
                modules_to_save[plain] = name
        return pairs, modules_to_save

    def _check(self) -> None:
        unknown = [name for name in (*self._pairs, *self._modules_to_save) if name not in self.infos]
        incomplete = [name for name, pair in self._pairs.items() if len(pair) < 2]
        wrong_shape = []
        for name, pair in self._pairs.items():
            if name in unknown or name in incomplete:
                continue
            a, b = (self._adapter.infos[pair[side]].shape for side in "AB")
            shape = self.infos[name].shape
            if self._config.get("fan_in_fan_out"):
                shape = shape[::-1]
            if len(a) != 2 or len(b) != 2 or (b[0], a[1]) != shape or a[0] != b[1]:
                wrong_shape.append(f"{name} {b}x{a} for {shape}")
        wrong_shape += [
            f"{plain} {self._adapter.infos[name].shape} for {self.infos[plain].shape}"
            for plain, name in self._modules_to_save.items()
            if plain not in unknown and self._adapter.infos[name].shape != self.infos[plain].shape
        ]
        problems = [
            f"{label}: {', '.join(names)}"
            for label, names in (
                ("not in the base", unknown),
                ("incomplete pair", incomplete),
                ("wrong shape", wrong_shape),
            )
            if names
        ]
        if problems:
            raise InputError(f"{self._path}: the adapter does not fit its base: {'; '.join(problems)}; check the base")

    def _scale(self, weight: str, rank: int) -> float:
        module = weight.removesuffix(".weight")
        alpha = _by_pattern(self._config.get("alpha_pattern"), module, self._config.get("lora_alpha", rank))
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def array(self, name: str) -> np.ndarray:
        if name in self._modules_to_save:
            return self._adapter.array(self._modules_to_save[name]).astype(self.infos[name].dtype)
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
    for prefix in ("base_model.model.", "base_model."):
        if name.startswith(prefix):
            name = name[len(prefix) :]
            break
    while name.startswith("model.model."):
        name = name[len("model.") :]
    return re.sub(r"\.(modules_to_save(\.default)?|base_layer|original_module)\.", ".", name)


def _by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """Returns the value of the first pattern that matches the module name or its end after a dot, as PEFT does."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def read_adapter_config(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); download the file again") from None
