"""Initial checkpoint of a Sa2VA: a VideoLLaMA3, a SAM-2, and random layers that join them."""

import dataclasses
import os
import pathlib

import numpy as np
import tensorstore as ts

from vl3_jax.checkpoint.init_source import leaf_generator, uniform_like_torch
from vl3_jax.checkpoint.names import ALL_PARTS, canonical_layout, name_map
from vl3_jax.checkpoint.opening import open_source
from vl3_jax.checkpoint.sa2va_names import JOINT_LEAVES, SAM2_LEAVES, STOCK_LEAVES
from vl3_jax.checkpoint.sidecar_files import CONFIG, copy_sidecar_files, with_sam2_section
from vl3_jax.checkpoint.sources import CheckpointSource, chat_config
from vl3_jax.checkpoint.tokenizer_files import add_tokens, dump
from vl3_jax.errors import InputError
from vl3_jax.json_file import read_object
from vl3_jax.model.config import ModelConfig
from vl3_jax.processing.tokenizer import GROUNDING_TOKENS
from vl3_jax.sa2va.sa2va_config import Sa2vaConfig
from vl3_jax.sam2.sam2_config import Sam2Config
from vl3_jax.storage.paths import temporary_folder

# Leaf of each table of the vocabulary and the axis of its rows.
_TABLES = {"llm/embed/embedding": 0, "llm/lm_head/kernel": 1}
_SCALE = 0.02  # of rows that are added to a table: Qwen2.5's own initialisation


class Sa2vaInitSource(CheckpointSource):
    """Joins two models; what is random follows from a seed.

    The tokenizer gets the five tokens of answers with masks. Tables of the vocabulary that have no rows for them grow.
    """

    kind = "init"

    def __init__(self, base: str | os.PathLike, sam2: str | os.PathLike, seed: int = 0, token: str | None = None):
        """Opens both models.

        Args:
          base: A complete VideoLLaMA3 of any kind.
          sam2: A SAM-2 of any kind, or a released Sa2VA, whose SAM-2 is taken.
          seed: Seed of the layers between them, and of rows that are added to tables.
          token: Hub token.

        Raises:
          InputError: A model cannot be read, or is not of the expected kind.
        """
        self._chat, self._sam2 = (open_source(each, token=token) for each in (base, sam2))
        self._seed = seed
        chat = chat_config(self._chat)
        if isinstance(self._chat.config, Sa2vaConfig):
            raise InputError(f"--base {self._chat.location}: draws masks already; train it, or give its base")
        if not self._chat.complete:
            raise InputError(f"--base {self._chat.location}: holds only {', '.join(self._chat.parts)}; give all of it")
        if not isinstance(self._sam2.config, Sam2Config):
            raise InputError(f"--sam2 {self._sam2.location}: is no SAM-2 ({self._sam2.kind}); give one")
        folder = temporary_folder(self, "vl3-sa2va-init-")
        self.location = f"{self._chat.location} + {self._sam2.location}"
        self.files, self.files_kind = folder, self._chat.files_kind
        vocabulary = self._write_files(folder, chat)
        self._added = vocabulary - chat.text.vocab_size
        self.config = Sa2vaConfig.joined(_with_vocabulary(chat, vocabulary), self._sam2.config)
        content = (folder / CONFIG).read_bytes()
        (folder / CONFIG).write_bytes(with_sam2_section(content, self.config.sam2))
        self.leaves = name_map(canonical_layout(self.config), self.config).leaves
        self.parts = tuple(part for part in ALL_PARTS if any(spec.part == part for spec in self.leaves.values()))
        self.dtypes = {path: self._dtype(path) for path in self.leaves}

    def _write_files(self, folder: pathlib.Path, chat: ModelConfig) -> int:
        """Writes the sidecar files with the added tokens, and returns the rows that the tables need."""
        copy_sidecar_files(self._chat.files, folder)
        ids, changed = add_tokens(folder, GROUNDING_TOKENS)
        if missing := [name for name in GROUNDING_TOKENS if name not in ids]:
            raise InputError(f"--base {self._chat.location}: no tokenizer to add {missing[0]} to; put it beside it")
        for name, content in changed.items():
            (folder / name).write_bytes(content)
        vocabulary = max(chat.text.vocab_size, 1 + max(ids[name] for name in GROUNDING_TOKENS))
        config_json = read_object(folder / CONFIG)
        for section in (config_json, config_json.section("text_config")):
            if "vocab_size" in section:
                section["vocab_size"] = vocabulary
                config_json |= {} if section is config_json else {"text_config": section}
        (folder / CONFIG).write_bytes(dump(config_json))
        return vocabulary

    def _place(self, leaf: str) -> tuple[CheckpointSource, str]:
        """Returns the model that a leaf comes from, and its path there."""
        for prefix, there in ((SAM2_LEAVES, ""), (STOCK_LEAVES, "decoder/")):
            if leaf.startswith(prefix):
                return self._sam2, there + leaf.removeprefix(prefix)
        return self._chat, leaf

    def _dtype(self, leaf: str) -> np.dtype:
        source, path = self._place("llm/embed/embedding" if leaf.startswith(JOINT_LEAVES) else leaf)
        return source.dtypes[path]

    def slice(self, leaf: str, layer: int | None) -> ts.TensorStore:
        if leaf.startswith(JOINT_LEAVES):
            fan_in = self.config.chat.text.hidden_size
            values = uniform_like_torch(leaf, self.leaves[leaf].shape, fan_in, self._seed)
            return ts.array(values.astype(self.dtypes[leaf]))
        source, path = self._place(leaf)
        if leaf not in _TABLES or not self._added:
            return source.slice(path, layer)
        axis, shape = _TABLES[leaf], list(source.leaves[path].shape)
        table = np.empty(shape, self.dtypes[leaf])
        source.read(path, layer, tuple(slice(0, size) for size in shape), table)
        shape[axis] = self._added
        rows = _SCALE * leaf_generator(leaf, self._seed).standard_normal(shape, np.float32)
        return ts.array(np.concatenate([table, rows.astype(table.dtype)], axis))

    def split(self, leaf: str, layer: int | None) -> tuple[int, int]:
        source, path = self._place(leaf)
        return (0, 1) if path not in source.leaves or leaf in _TABLES else source.split(path, layer)

    def file_fingerprints(self) -> list:
        return [*self._chat.file_fingerprints(), *self._sam2.file_fingerprints(), self._seed]


def _with_vocabulary(config: ModelConfig, rows: int) -> ModelConfig:
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=rows))
