"""Writes a tiny random checkpoint in the official layout with the tokenizer and settings of the synthetic data."""

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
from vl3_jax.model import preset
from vl3_jax.processing.tokenizer import IMAGE, Tokenizer

_EMBEDDING_SCALE = np.float32(0.1)  # with a larger scale a tied output layer repeats the last token forever


def write_small_checkpoint(folder: pathlib.Path, seed: int = 0, size: str = "tiny") -> pathlib.Path:
    """Writes the checkpoint to a new folder; `size` is the name of a preset."""
    config = preset(size)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=1024))
    params = flatten_dict(random_params(config, seed), sep="/")
    params["llm/embed/embedding"] *= _EMBEDDING_SCALE
    tensors = {
        spec.name: np.ascontiguousarray(
            spec.to_tensor(params[spec.leaf] if spec.layer is None else params[spec.leaf][spec.layer])
        )
        for spec in name_map("official", config).tensors.values()
    }
    tokenizer = Tokenizer.from_folder(TOKENIZER)
    special = {"image_token_index": tokenizer.id_of(IMAGE), "bos_token_id": None, "eos_token_id": tokenizer.stop_ids[0]}
    write_folder(folder, "official", config, "float32", tensors=tensors, change=special)
    shutil.copyfile(TOKENIZER, folder / "tokenizer.json")
    (folder / "tokenizer_config.json").unlink()  # belongs to another tokenizer
    for name, change in (
        ("preprocessor_config.json", {"min_tokens": 4}),
        ("generation_config.json", {"eos_token_id": tokenizer.stop_ids, "repetition_penalty": 1.0}),
    ):
        content = json.loads((folder / name).read_text()) | change
        (folder / name).write_text(json.dumps(content))
    return folder
