"""A small Sa2VA whose answers have masks, written with NumPy alone."""

import pathlib

import numpy as np
from safetensors.numpy import load_file, save_file

from support.checkpoints import write_small_checkpoint
from support.sam2_folders import small_sam2, write_sam2_folder
from vl3_jax.checkpoint import Sa2vaInitSource, write_hf
from vl3_jax.processing.tokenizer import MASK, Tokenizer

LIKELY = 272  # what the small model says most


def write_small_sa2va(folder: pathlib.Path, draws: bool = True) -> pathlib.Path:
    """Writes the folder of a model, and those of its halves beside it.

    Args:
      folder: Folder to create files in.
      draws: Whether `[SEG]` is generated where the base would say its likeliest token; otherwise never.

    Returns:
      The folder of the model.
    """
    write_sam2_folder(folder / "sam2", small_sam2("2.0"))
    source = Sa2vaInitSource(write_small_checkpoint(folder / "vl3"), folder / "sam2")
    write_hf(source, folder / "sa2va", "official", quiet=True)
    path, name = folder / "sa2va" / "model.safetensors", "model.embed_tokens.weight"
    tensors = {key: np.array(value) for key, value in load_file(path).items()}
    table, place = tensors[name], Tokenizer.from_folder(folder / "sa2va").id_of(MASK)
    table[place] = 1.05 * table[LIKELY] if draws else 0
    save_file(tensors, path, {"format": "pt"})
    return folder / "sa2va"
