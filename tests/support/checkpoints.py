"""Writes complete tiny checkpoints: random weights, the real tokenizer or that of the synthetic data, settings."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
from flax.traverse_util import flatten_dict

from data_pipelines.synthetic.tokenizer import TOKENIZER
from support.hf_folders import write_folder
from support.weights import random_params
from vl3_jax.checkpoint.names import name_map
from vl3_jax.model import ModelConfig, preset
from vl3_jax.processing.tokenizer import IMAGE, Tokenizer

DATA = pathlib.Path(__file__).parents[1] / "data"
SPECIAL = {"image_token_id": 151_655, "video_token_id": 151_656}
_EMBEDDING_SCALE = np.float32(0.1)  # with a larger scale a tied output layer repeats the last token forever


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
    tensors = _tensors("native", config, flatten_dict(random_params(config, seed), sep="/"))
    write_folder(folder, "native", config, "float32", tensors=tensors, change=SPECIAL)
    return _add_files(folder, generation)


def write_small_checkpoint(
    folder: pathlib.Path, seed: int = 0, size: str = "tiny", vocab_size: int = 1024
) -> pathlib.Path:
    """Writes a checkpoint with the tokenizer and settings of the synthetic data, in the official layout.

    Args:
      folder: Folder to create.
      seed: Seed of the parameters.
      size: Name of a preset.
      vocab_size: Rows of the table of embeddings; the tokenizer has 1,024 tokens.
    """
    config = preset(size)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=vocab_size))
    params = flatten_dict(random_params(config, seed), sep="/")
    params["llm/embed/embedding"] *= _EMBEDDING_SCALE
    tokenizer = Tokenizer.from_folder(TOKENIZER)
    special = {"image_token_index": tokenizer.id_of(IMAGE), "bos_token_id": None, "eos_token_id": tokenizer.stop_ids[0]}
    write_folder(folder, "official", config, "float32", tensors=_tensors("official", config, params), change=special)
    shutil.copyfile(TOKENIZER, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").unlink()  # belongs to another tokenizer
    for name, change in (
        ("preprocessor_config.json", {"min_tokens": 4}),
        ("generation_config.json", {"eos_token_id": tokenizer.stop_ids, "repetition_penalty": 1.0}),
    ):
        content = json.loads((folder / name).read_text()) | change
        (folder / name).write_text(json.dumps(content))
    return folder


def _tensors(layout: str, config: ModelConfig, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors of a layout by name, from parameters by path."""
    return {
        spec.name: np.ascontiguousarray(
            spec.to_tensor(params[spec.leaf] if spec.layer is None else params[spec.leaf][spec.layer])
        )
        for spec in name_map(layout, config).tensors.values()
    }


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
