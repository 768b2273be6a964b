"""A small Sa2VA whose answers have masks, written with NumPy alone."""

import pathlib

import numpy as np
from safetensors.numpy import load_file, save_file

from support.checkpoints import write_small_checkpoint
from support.sam2_folders import random_sam2_tensors, small_sam2, write_sam2_folder
from vl3_jax.checkpoint import Sa2vaInitSource, write_hf
from vl3_jax.processing.tokenizer import MASK, Tokenizer
from vl3_jax.sam2.sam2_config import sam2_preset

LIKELY = 272  # what the small model says most


def write_small_sa2va(
    folder: pathlib.Path, draws: bool = True, released: str | None = None, vocab_size: int = 1024
) -> pathlib.Path:
    """Writes the folder of a model, and those of its halves beside it.

    Args:
      folder: Folder to create files in.
      draws: Whether `[SEG]` is generated where the base would say its likeliest token; otherwise as `init` has it.
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
    if not draws:
        return folder / "sa2va"
    path, name = folder / "sa2va" / "model.safetensors", "model.embed_tokens.weight"
    tensors = {key: np.array(value) for key, value in load_file(path).items()}
    table, place = tensors[name], Tokenizer.from_folder(folder / "sa2va").id_of(MASK)
    table[place] = 1.05 * table[LIKELY]
    save_file(tensors, path, {"format": "pt"})
    return folder / "sa2va"
