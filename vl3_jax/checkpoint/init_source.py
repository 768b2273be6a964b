"""Initial checkpoint of stage 1: a SigLIP tower, a Qwen2.5 decoder and a randomly initialised projector."""

import hashlib
import math
import os
import pathlib

import numpy as np

from vl3_jax.checkpoint.hf_source import as_official, open_hf
from vl3_jax.checkpoint.names import PARTS, name_map
from vl3_jax.checkpoint.sidecar_files import IMAGE, PROCESSOR, copy_sidecar_files, export_sidecar_files
from vl3_jax.checkpoint.sources import TensorSource
from vl3_jax.checkpoint.tensors import Overlay, TensorFiles, TensorInfo
from vl3_jax.errors import InputError
from vl3_jax.model.config import ModelConfig
from vl3_jax.storage.paths import temporary_folder


class InitSource(TensorSource):
    """Combines the tower of one model and the decoder of another with a projector initialised from a seed."""

    def __init__(self, vision: str | os.PathLike, llm: str | os.PathLike, seed: int = 0, token: str | None = None):
        """Opens both models.

        Args:
          vision: SigLIP (whole or its tower), SigLIP-NaViT, or a VideoLLaMA3 whose tower is used.
          llm: Qwen2.5, or a VideoLLaMA3 whose decoder is used.
          seed: Seed of the projector.
          token: Hub token.

        Raises:
          InputError: A model cannot be read or has no tower or decoder.
        """
        tower = open_hf(vision, parts=("vision",), token=token)
        decoder = open_hf(llm, parts=("llm", "head"), token=token)
        for source, part, flag in ((tower, "vision", "--vision"), (decoder, "llm", "--llm")):
            if part not in source.parts:
                raise InputError(f"{flag} {source.location}: a {source.kind} checkpoint has no {part}; give another")
        config = ModelConfig(tower.config.vision, decoder.config.text)
        dtype = decoder.dtypes["llm/embed/embedding"]
        tensors = Overlay([as_official(tower), as_official(decoder), RandomProjector(config, dtype, seed)])
        self._models, self._seed = (tower, decoder), seed
        files = self._write_sidecar_files(decoder, config, dtype.name)
        location = f"{tower.location} + {decoder.location}"
        super().__init__("official", tensors, config, location, files, parts=PARTS)
        self.kind = "init"

    def _write_sidecar_files(self, decoder: TensorSource, config: ModelConfig, dtype: str) -> pathlib.Path:
        """Writes config.json, processor files and the decoder's tokenizer with the added tokens to a new folder."""
        folder = temporary_folder(self, "vl3-init-")
        decoder_files, files = folder / "decoder", folder / "files"
        copy_sidecar_files(decoder.files, decoder_files)
        for name in (IMAGE, PROCESSOR, "chat_template.json"):
            (decoder_files / name).unlink(missing_ok=True)  # belongs to a text-only model or to another tower
        files.mkdir()
        kind = decoder.files_kind
        if kind == "official":  # a finished model: as "official-train", its config.json gets the new tower's sizes
            kind = "official-train"
        for name, content in export_sidecar_files(decoder_files, kind, config, "official", dtype).items():
            (files / name).write_bytes(content)
        return files

    def file_fingerprints(self) -> list:
        return [*(model.file_fingerprints() for model in self._models), self._seed]


class RandomProjector(TensorFiles):
    """Tensors of a projector, initialised like torch.nn.Linear: uniform within 1 / sqrt(fan-in), biases too."""

    def __init__(self, config: ModelConfig, dtype: np.dtype, seed: int):
        self.paths, self._seed = (), seed
        self._specs = name_map("official", config, ("projector",)).tensors
        self.infos = {name: TensorInfo(spec.shape, dtype, "seed") for name, spec in self._specs.items()}

    def array(self, name: str) -> np.ndarray:
        spec = self._specs[name]
        fan_in = spec.sizes["W" if "/fc1/" in spec.leaf else "D"]
        values = uniform_like_torch(spec.leaf, spec.slice_shape, fan_in, self._seed)
        return spec.to_tensor(values.astype(self.infos[name].dtype))


def leaf_generator(leaf: str, seed: int) -> np.random.Generator:
    """Returns the random numbers of a leaf, which depend on no other leaf."""
    leaf_hash = int.from_bytes(hashlib.sha256(leaf.encode()).digest()[:8], "little")
    return np.random.default_rng([seed, leaf_hash])


def uniform_like_torch(leaf: str, shape: tuple[int, ...], fan_in: int, seed: int) -> np.ndarray:
    """Returns a kernel or bias as torch.nn.Linear creates it, float32: uniform within 1 / sqrt(fan-in)."""
    bound = 1 / math.sqrt(fan_in)
    return leaf_generator(leaf, seed).uniform(-bound, bound, shape).astype(np.float32)
