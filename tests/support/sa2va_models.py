"""A small Sa2VA whose answers have masks, written with NumPy alone."""

import pathlib
from typing import Literal

import numpy as np
from safetensors.numpy import load_file, save_file

from support.checkpoints import write_small_checkpoint
from support.sam2_folders import random_sam2_tensors, small_sam2, write_sam2_folder
from vl3_jax.checkpoint import Sa2vaInitSource, write_hf
from vl3_jax.processing.tokenizer import MASK, Tokenizer
from vl3_jax.sam2.sam2_config import sam2_preset

Draws = Literal["likely", "always", "new"]
LIKELY = 272  # what the small model says most


def write_small_sa2va(
    folder: pathlib.Path, draws: Draws = "likely", released: str | None = None, vocab_size: int = 1024
) -> pathlib.Path:
    """Writes the folder of a model, and those of its halves beside it.

    Args:
      folder: Folder to create files in.
      draws: What it answers: "likely" has `[SEG]` where the base would say its likeliest token, "always" nothing else,
        and "new" is what `init` has made.
      released: Size of a released SAM-2, whose sizes this one then has; None for a small one.
      vocab_size: Rows of the base's table of embeddings; of more than 1,024, some are left for new tokens.

    Returns:
      The folder of the model.
    """
    if released is None:
        write_sam2_folder(folder / "sam2", small_sam2("2.0"))
    else:
        config = sam2_preset(released, "2.0")
        narrow = {name: value * np.float32(0.05) for name, value in random_sam2_tensors(config).items()}
        write_sam2_folder(folder / "sam2", config, **narrow)
    source = Sa2vaInitSource(write_small_checkpoint(folder / "vl3", vocab_size=vocab_size), folder / "sam2")
    write_hf(source, folder / "sa2va", "official", quiet=True)
    if draws == "new":
        return folder / "sa2va"
    path, table = folder / "sa2va" / "model.safetensors", "model.embed_tokens.weight"
    tensors = {key: np.array(value) for key, value in load_file(path).items()}
    place = Tokenizer.from_folder(folder / "sa2va").id_of(MASK)
    tensors[table][place] = 1.05 * tensors[table][LIKELY] if draws == "likely" else _always(tensors, table)
    save_file(tensors, path, {"format": "pt"})
    return folder / "sa2va"


def _always(tensors: dict[str, np.ndarray], table: str) -> np.ndarray:
    """Makes a bias of the last layer outweigh all else, and returns the embedding that it makes the likeliest."""
    attention = max(name for name in tensors if name.startswith("model.layers.") and name.endswith("v_proj.bias"))
    bias, output = tensors[attention], tensors[attention.replace("v_proj.bias", "o_proj.weight")]
    heads = bias.reshape(2, -1).repeat(output.shape[1] // bias.size, axis=0).ravel()  # of 2 heads of keys and values
    size = 10 * np.linalg.norm(tensors[table], axis=1).mean()
    tensors[attention] = bias * 100 * size / np.linalg.norm(output @ heads)
    row = tensors["model.norm.weight"] * (output @ heads)
    return size * row / np.linalg.norm(row)
