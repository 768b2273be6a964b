"""Initial checkpoint of stage 1: a SigLIP tower, a Qwen2.5 decoder and a randomly initialised projector."""

import hashlib
import math
import os
import pathlib
import shutil
import tempfile
import weakref

import numpy as np
import tensorstore as ts

from vl3_jax.checkpoint.hf_source import open_hf
from vl3_jax.checkpoint.names import PARTS, name_map
from vl3_jax.checkpoint.sidecar_files import copy_sidecar_files, export_sidecar_files, pixel_statistics
from vl3_jax.checkpoint.sources import CheckpointSource, TensorSource, as_store
from vl3_jax.errors import InputError
from vl3_jax.model.config import ModelConfig


class InitSource(CheckpointSource):
    """Combines the tower of one model and the decoder of another with a projector initialised from a seed.

    The projector is initialised like torch.nn.Linear: weights and biases are uniform within 1 / sqrt(fan-in).
    """

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
        self._tower: TensorSource = open_hf(vision, parts=("vision",), token=token)
        self._decoder: TensorSource = open_hf(llm, parts=("llm", "head"), token=token)
        for source, part, flag in ((self._tower, "vision", "--vision"), (self._decoder, "llm", "--llm")):
            if part not in source.parts:
                raise InputError(f"{flag} {source.location}: a {source.kind} checkpoint has no {part}; give another")
        self.kind, self.location = "init", f"{self._tower.location} + {self._decoder.location}"
        self.config = ModelConfig(self._tower.config.vision, self._decoder.config.text)
        self.parts = tuple(part for part in PARTS if part != "head" or not self.config.text.tie_word_embeddings)
        self.leaves = name_map("official", self.config).leaves
        self._seed = seed
        dtype = self._decoder.dtypes["llm/embed/embedding"]
        self.dtypes = {path: self._owner(path).dtypes[path] if self._owner(path) else dtype for path in self.leaves}
        self.files, self.files_kind = self._write_sidecar_files(dtype.name), "official"

    def _owner(self, leaf: str) -> TensorSource | None:
        return {"vision": self._tower, "llm": self._decoder, "projector": None}[leaf.split("/")[0]]

    def _write_sidecar_files(self, dtype: str) -> pathlib.Path:
        """Writes config.json, processor files and the decoder's tokenizer with the added tokens to a new folder."""
        folder = pathlib.Path(tempfile.mkdtemp(prefix="vl3-init-"))
        self._cleanup = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        decoder_files = folder / "decoder"
        copy_sidecar_files(self._decoder.files, decoder_files)
        for name in ("preprocessor_config.json", "processor_config.json", "chat_template.json"):
            (decoder_files / name).unlink(missing_ok=True)  # belongs to a text-only model or to another tower
        files = folder / "files"
        files.mkdir()
        kind = self._decoder.files_kind
        if kind == "official":  # a finished model: as "official-train", its config.json gets the new tower's sizes
            kind = "official-train"
        for name, content in export_sidecar_files(decoder_files, kind, self.config, "official", dtype).items():
            (files / name).write_bytes(content)
        assert pixel_statistics(files)["image_mean"] == self.config.vision.image_mean
        return files

    def slice(self, leaf: str, layer: int | None) -> ts.TensorStore:
        owner = self._owner(leaf)
        return owner.slice(leaf, layer) if owner else as_store(self._projector(leaf))

    def _projector(self, leaf: str) -> np.ndarray:
        fan_in = {
            "fc1": self.config.vision.hidden_size,
            "fc2": self.config.text.hidden_size,
        }[leaf.split("/")[1]]
        name_hash = int.from_bytes(hashlib.sha256(leaf.encode()).digest()[:8], "little")
        rng = np.random.default_rng([self._seed, name_hash])
        bound = 1 / math.sqrt(fan_in)
        values = rng.uniform(-bound, bound, self.leaves[leaf].shape).astype(np.float32)
        return values.astype(self.dtypes[leaf])

    def has_nan(self, leaf: str, layer: int | None) -> bool:
        owner = self._owner(leaf)
        return owner.has_nan(leaf, layer) if owner else False

    def file_fingerprints(self) -> list:
        return [self._tower.file_fingerprints(), self._decoder.file_fingerprints(), self._seed]
