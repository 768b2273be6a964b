"""Writes small SAM-2 folders with safetensors and NumPy alone."""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from vl3_jax.checkpoint import name_map
from vl3_jax.checkpoint.sam2_hf_config import sam2_config_json
from vl3_jax.json_file import JsonObject
from vl3_jax.sam2.sam2_config import HieraConfig, Sam2Config


def small_sam2(version: str = "2.1") -> Sam2Config:
    """Returns a configuration of a few channels and layers."""
    hiera = HieraConfig((8, 16, 32, 64), (1, 2, 4, 8), (1, 2, 2, 1), (8, 4, 6, 3), (4,))
    sizes = {"decoder_mlp": 16, "iou_width": 8, "memory_layers": 2, "memory_mlp": 16, "fuser_mlp": 16, "width": 64}
    flags = {"pointer_time": version == "2.1", "occlusion": version == "2.1"}
    return Sam2Config(hiera, image_size=128, memory_width=32, **sizes, **flags)


def random_sam2_tensors(config: Sam2Config, layout: str = "sam2") -> dict[str, np.ndarray]:
    """Returns random tensors of a layout."""
    rng, names = np.random.default_rng(0), name_map(layout, config)
    tensors = {name: rng.standard_normal(spec.shape, np.float32) for name, spec in names.tensors.items()}
    for name, spec in names.tensors.items():  # some tensors are copies of others
        tensors[name] = tensors[names.leaves[spec.leaf].tensor(spec.layer).name]
    return tensors


def write_sam2_folder(
    folder: pathlib.Path, config: Sam2Config, layout: str = "sam2", change: dict | None = None, **tensors: np.ndarray
) -> dict[str, np.ndarray]:
    """Writes a checkpoint folder.

    Args:
      folder: Folder to create.
      config: Configuration.
      layout: Layout of the tensors.
      change: Keys of config.json to replace.
      **tensors: Tensors to replace or to add.

    Returns:
      The stored tensors.
    """
    folder.mkdir()
    stored = {**random_sam2_tensors(config, layout), **tensors}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    content = sam2_config_json(config, JsonObject({}, "config.json"), "float32")
    (folder / "config.json").write_text(json.dumps({**content, **(change or {})}))
    return stored
