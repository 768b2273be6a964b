"""The start of stage 1: a SigLIP tower, a Qwen2.5 decoder and a fresh projector, as one source."""

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
    """Tower of one model, decoder of another, projector from a seed.

    The projector is drawn as torch draws a Linear: uniform within 1 / sqrt(fan-in), weights and biases.
    """

    def __init__(self, vision: str | os.PathLike, llm: str | os.PathLike, seed: int = 0, token: str | None = None):
        """Opens both.

        Args:
          vision: SigLIP (whole or its tower), SigLIP-NaViT, or a VideoLLaMA3 whose tower is taken.
          llm: Qwen2.5, or a VideoLLaMA3 whose decoder is taken.
          seed: of the projector.
          token: Hub token.

        Raises:
          InputError: one of them is not what it should be.
        """
        self._tower: TensorSource = open_hf(vision, parts=("vision",), token=token)
        self._decoder: TensorSource = open_hf(llm, parts=("llm", "head"), token=token)
        for found, part, name in ((self._tower, "vision", "--vision"), (self._decoder, "llm", "--llm")):
            if part not in found.parts:
                raise InputError(f"{name} {found.location}: a {found.kind} checkpoint has no such part; give another")
        self.kind, self.location = "start", f"{self._tower.location} + {self._decoder.location}"
        self.config = ModelConfig(self._tower.config.vision, self._decoder.config.text)
        self.parts = tuple(part for part in PARTS if part != "head" or not self.config.text.tie_word_embeddings)
        self.leaves = name_map("official", self.config).leaves
        self._seed = seed
        dtype = self._decoder.dtypes["llm/embed/embedding"]
        self.dtypes = {path: self._owner(path).dtypes[path] if self._owner(path) else dtype for path in self.leaves}
        self.files, self.files_kind = self._make_files(dtype.name), "official"

    def _owner(self, leaf: str) -> TensorSource | None:
        return {"vision": self._tower, "llm": self._decoder, "projector": None}[leaf.split("/")[0]]

    def _make_files(self, dtype: str) -> pathlib.Path:
        """config.json and processor files of the new model, and the decoder's tokenizer with the added tokens."""
        folder = pathlib.Path(tempfile.mkdtemp(prefix="vl3-start-"))
        self._cleanup = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        joined = folder / "joined"
        copy_sidecar_files(self._decoder.files, joined)
        for name in ("preprocessor_config.json", "processor_config.json", "chat_template.json"):
            (joined / name).unlink(missing_ok=True)  # of a text-only model or of another start
        made = folder / "made"
        made.mkdir()
        kind = self._decoder.files_kind
        if kind == "official":  # a decoder out of a finished model: its files, the new tower's sizes
            kind = "official-train"
        for name, content in export_sidecar_files(joined, kind, self.config, "official", dtype).items():
            (made / name).write_bytes(content)
        assert pixel_statistics(made)["image_mean"] == self.config.vision.image_mean
        return made

    def slice(self, leaf: str, layer: int | None) -> ts.TensorStore:
        """See `Source.slice`."""
        owner = self._owner(leaf)
        return owner.slice(leaf, layer) if owner else as_store(self._projector(leaf))

    def _projector(self, leaf: str) -> np.ndarray:
        fan_in = {
            "fc1": self.config.vision.hidden_size,
            "fc2": self.config.text.hidden_size,
        }[leaf.split("/")[1]]
        name = int.from_bytes(hashlib.sha256(leaf.encode()).digest()[:8], "little")
        generator = np.random.default_rng([self._seed, name])
        bound = 1 / math.sqrt(fan_in)
        values = generator.uniform(-bound, bound, self.leaves[leaf].shape).astype(np.float32)
        return values.astype(self.dtypes[leaf])

    def has_nan(self, leaf: str, layer: int | None) -> bool:
        """See `Source.has_nan`."""
        owner = self._owner(leaf)
        return owner.has_nan(leaf, layer) if owner else False

    def fingerprints(self) -> list:
        """See `Source.stamps`."""
        return [self._tower.fingerprints(), self._decoder.fingerprints(), self._seed]
