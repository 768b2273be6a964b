"""Writes PEFT folders with random LoRA adapters, without PEFT."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vl3_jax.checkpoint.names import name_map
from vl3_jax.model import ModelConfig

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(
    folder: pathlib.Path,
    config: ModelConfig,
    modules: Sequence[str] = ALL,
    rank: int = 2,
    seed: int = 0,
    base: pathlib.Path | str = "",
    prefix: str = "model.layers.",
    whole: Mapping[str, np.ndarray] | None = None,
    **settings: Any,
) -> pathlib.Path:
    """Writes an adapter of some modules of a model in the official layout, large enough to change its answers.

    Args:
      folder: Folder to create.
      config: Configuration of the model.
      modules: Names of modules, such as "q_proj".
      rank: Rank of the adapters.
      seed: Seed of their values.
      base: Folder of the base.
      prefix: What the names of the adapted weights begin with.
      whole: Further tensors.
      **settings: Further settings of adapter_config.json.
    """
    rng, tensors = np.random.default_rng(seed), dict(whole or {})
    for name, spec in name_map("official", config).tensors.items():
        module = name.removesuffix(".weight")
        if name.startswith(prefix) and name.endswith(".weight") and module.endswith(tuple(modules)):
            rows, columns = spec.shape
            for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                values = rng.standard_normal(shape, np.float32) * np.float32(columns**-0.25)
                tensors[f"base_model.model.{module}.lora_{side}.weight"] = values
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": 1.5 * rank, "base_model_name_or_path": str(base)}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(content | settings))
    return folder
