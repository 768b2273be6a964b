"""Folders of the released sizes with random weights, written a block at a time."""

import json
import pathlib
import shutil

import numpy as np

from data_pipelines.synthetic.tokenizer import TOKENIZER
from support.hf_folders import config_json
from vl3_jax.checkpoint.names import name_map
from vl3_jax.model import preset

_BLOCK = 2**24  # values


def write_released_size(folder: pathlib.Path, size: str) -> pathlib.Path:
    """Writes a model of the native layout in bfloat16: 3.9 GB of "2b", 16.1 GB of "7b".

    Args:
      folder: Where to write it.
      size: Name of the preset.
    """
    folder.mkdir(parents=True)
    config, rng, header, end = preset(size), np.random.default_rng(0), {}, 0
    tensors = name_map("native", config).tensors
    for name, spec in tensors.items():
        start, end = end, end + 2 * spec.size
        header[name] = {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in tensors.values():
            for start in range(0, spec.size, _BLOCK):
                values = 0.02 * rng.standard_normal(min(_BLOCK, spec.size - start), np.float32)
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    (folder / "config.json").write_text(json.dumps(config_json("native", config)))
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    return folder
