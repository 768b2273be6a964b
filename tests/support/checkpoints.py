"""Writes complete tiny checkpoints in the native layout: random weights, the real tokenizer, processor files."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
from flax.traverse_util import flatten_dict

from support.hf_folders import write_folder
from support.weights import random_params
from vl3_jax.checkpoint.names import name_map
from vl3_jax.model import ModelConfig, preset

DATA = pathlib.Path(__file__).parents[1] / "data"
SPECIAL = {"image_token_id": 151_655, "video_token_id": 151_656}


def config_with_real_vocabulary(name: str = "tiny") -> ModelConfig:
    """Returns a small preset with the vocabulary size of Qwen2.5."""
    config = preset(name)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=151_936))


def write_reference_checkpoint(folder: pathlib.Path, reference, **generation) -> pathlib.Path:
    """Saves a reference model with tokenizer, processor and generation files, like a released model."""
    reference.config.image_token_id, reference.config.video_token_id = SPECIAL.values()
    reference.save_pretrained(folder)
    return _add_files(folder, generation)


def write_random_checkpoint(folder: pathlib.Path, seed: int = 0, **generation) -> pathlib.Path:
    """Writes a checkpoint with random parameters of this package, without the reference model."""
    config = config_with_real_vocabulary()
    params = flatten_dict(random_params(config, seed), sep="/")
    tensors = {
        spec.name: np.ascontiguousarray(
            spec.to_tensor(params[spec.leaf] if spec.layer is None else params[spec.leaf][spec.layer])
        )
        for spec in name_map("native", config).tensors.values()
    }
    write_folder(folder, "native", config, "float32", tensors=tensors, change=SPECIAL)
    return _add_files(folder, generation)


def _add_files(folder: pathlib.Path, generation: dict) -> pathlib.Path:
    shutil.copyfile(DATA / "tokenizer" / "tokenizer.json", folder / "tokenizer.json")
    image = {"min_pixels": 3136, "max_pixels": 3_211_264, "merge_size": 1, "patch_size": 14}
    video = {"min_pixels": 12_544, "max_pixels": 12_845_056, "merge_size": 2, "max_frames": 180}
    normalisation = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for name, content in (
        ("preprocessor_config.json", image | normalisation),
        ("video_preprocessor_config.json", video | normalisation),
        ("generation_config.json", {"eos_token_id": [151_645, 151_643], **generation}),
    ):
        (folder / name).write_text(json.dumps(content))
    return folder
