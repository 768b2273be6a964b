"""Sources: checkpoints of any kind as leaves of the parameter tree, read slice by slice."""

import abc
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import tensorstore as ts

from vl3_jax.checkpoint.hf_files import file_fingerprints, fold_names
from vl3_jax.checkpoint.names import PARTS, LeafSpec, NameMap, is_droppable, name_map
from vl3_jax.checkpoint.tensors import FLOATS, TensorFiles
from vl3_jax.checkpoint.transpose import copy_view
from vl3_jax.errors import InputError
from vl3_jax.model.config import ModelConfig

logger = logging.getLogger(__name__)


class CheckpointSource(abc.ABC):
    """Opened checkpoint that `load`, `convert`, `export`, `inspect` and `verify` read from.

    Attributes:
      kind: "orbax", "init", or a layout of the name map ("official", "native", ...).
      location: Path, URL or Hub id, for messages.
      config: Model configuration. For a tower or a decoder alone, only that half is meaningful.
      parts: Parts of the model in the checkpoint; see `names.PARTS`.
      files: Local folder with config.json, tokenizer and processor files.
      files_kind: Layout of the config.json in `files`.
      leaves: Leaf specs by path.
      dtypes: Stored dtypes by leaf path.
    """

    kind: str
    location: str
    config: ModelConfig
    parts: tuple[str, ...]
    files: pathlib.Path
    files_kind: str
    leaves: dict[str, LeafSpec]
    dtypes: dict[str, np.dtype]

    @abc.abstractmethod
    def slice(self, leaf: str, layer: int | None) -> ts.TensorStore:
        """Opens one layer of a stacked leaf, or a whole leaf if `layer` is None, with the leaf's axes."""

    @abc.abstractmethod
    def file_fingerprints(self) -> list:
        """Returns path, size and modification time of each file, which identify the source."""

    def read(self, leaf: str, layer: int | None, region: tuple[slice, ...], out: np.ndarray) -> None:
        """Reads a region of a slice into an array.

        Args:
          leaf: Path of the leaf.
          layer: Layer of a stacked leaf, or None.
          region: Region of the slice.
          out: C-contiguous array to fill; the values are cast to its dtype.
        """
        store = self.slice(leaf, layer)
        if store.dtype.numpy_dtype != out.dtype:
            store = ts.cast(store, ts.dtype(out.dtype.name))
        if region:
            store = store[region][ts.d[:].translate_to[0]]
        ts.array(out, copy=False).write(store).result()

    def has_nan(self, leaf: str, layer: int | None) -> bool:
        """Returns whether the slice contains NaN; only Hugging Face sources are checked, others return False."""
        return False

    @property
    def nbytes(self) -> int:
        """Size of all leaves in bytes."""
        return sum(spec.size * self.dtypes[path].itemsize for path, spec in self.leaves.items())

    @property
    def complete(self) -> bool:
        """Whether the checkpoint has a tower, a projector and a decoder."""
        return {"vision", "projector", "llm"} <= set(self.parts)

    def fingerprint(self, **extra) -> str:
        """Returns a hash of the source's kind and files and of the options `extra`, which identifies a job."""
        content = json.dumps([self.kind, self.file_fingerprints(), sorted(extra.items())], default=str)
        return hashlib.sha256(content.encode()).hexdigest()


class TensorSource(CheckpointSource):
    """Hugging Face tensors as leaves of the parameter tree, through the name map."""

    def __init__(
        self,
        layout: str,
        tensors: TensorFiles,
        config: ModelConfig,
        location: str,
        files: pathlib.Path,
        files_kind: str | None = None,
        parts: Sequence[str] = PARTS,
        keep: object = None,
    ):
        """Checks the tensors against the name map.

        Args:
          layout: Key of `names.LAYOUTS` that the tensor names follow.
          tensors: Tensors of the checkpoint.
          config: Model configuration.
          location: Folder, URL or Hub id, for messages.
          files: Local folder with config.json and tokenizer files.
          files_kind: Layout of that config.json; by default `layout`.
          parts: Parts of the model to read; tensors of other parts are ignored.
          keep: Object that must live as long as the source, such as one that owns temporary files.

        Raises:
          InputError: Tensors are missing, unexpected, or of a wrong shape or dtype; the message lists all of them.
        """
        self.kind, self.location, self.config, self.files = layout, location, config, files
        self.files_kind = files_kind or layout
        self.tensors, self.map = tensors, name_map(layout, config, tuple(parts))
        self._keep = keep
        self.parts = tuple(part for part in PARTS if any(spec.part == part for spec in self.map.leaves.values()))
        self.leaves = self.map.leaves
        check_tensors(tensors, self.map, config, location)
        self._specs = self.map.by_leaf()
        self.dtypes = {path: self._leaf_dtype(spec) for path, spec in self.leaves.items()}
        self._warn_untied_head()

    def _leaf_dtype(self, spec: LeafSpec) -> np.dtype:
        dtypes = {self.tensors.infos[tensor.name].dtype for tensor in spec.tensors}
        if len(dtypes) == 1:
            return dtypes.pop()
        names = ", ".join(sorted(map(str, dtypes)))
        logger.warning("warning: %s: layers of different dtypes (%s) are read as float32", spec.path, names)
        return np.dtype(np.float32)

    def _warn_untied_head(self) -> None:
        """Logs a warning if the embeddings are tied but the checkpoint has a head that differs from them."""
        if not self.config.text.tie_word_embeddings or "lm_head.weight" not in self.tensors.infos:
            return
        embed = self._specs.get(("llm/embed/embedding", None))
        if embed is None:
            return
        head, table = self.tensors.array("lm_head.weight"), self.tensors.array(embed.name)
        same = head.shape == table.shape and all(
            np.array_equal(_bits(head[start : start + 4096]), _bits(table[start : start + 4096]))
            for start in range(0, len(table), 4096)
        )
        if not same:
            logger.warning(
                "warning: %s: the configuration ties the embeddings, and lm_head.weight differs from %s; "
                "lm_head.weight is ignored",
                self.location,
                embed.name,
            )

    def slice(self, leaf: str, layer: int | None) -> ts.TensorStore:
        spec = self._specs[leaf, layer]
        return as_store(spec.to_leaf(self.tensors.array(spec.name)))

    def read(self, leaf: str, layer: int | None, region: tuple[slice, ...], out: np.ndarray) -> None:
        spec = self._specs[leaf, layer]
        copy_view(out, spec.to_leaf(self.tensors.array(spec.name))[region])

    def has_nan(self, leaf: str, layer: int | None) -> bool:
        return contains_nan(self.tensors.array(self._specs[leaf, layer].name))

    def file_fingerprints(self) -> list:
        config = self.files / "config.json"
        return file_fingerprints([*self.tensors.paths, *([os.fspath(config)] if config.exists() else [])])


def as_store(array: np.ndarray) -> ts.TensorStore:
    """Wraps a NumPy array in a TensorStore; copies it only if it is not aligned to its item size."""
    if not array.flags.aligned:
        array = np.array(array)
    return ts.array(array, copy=False)


def check_tensors(tensors: TensorFiles, names: NameMap, config: ModelConfig, location: str) -> None:
    """Checks that every tensor of the name map is present with its shape and a float dtype, and that no other is.

    Args:
      tensors: Tensors of the checkpoint.
      names: Name map of the parts to read.
      config: Model configuration.
      location: Location of the checkpoint, for the error message.

    Raises:
      InputError: The tensors differ from the name map; the message lists all differences.
    """
    expected = name_map(names.layout, config).tensors
    missing = [name for name in names.tensors if name not in tensors.infos]
    unexpected = [name for name in tensors if name not in expected and not is_droppable(name, names.layout, config)]
    stored = [(spec, tensors.infos[spec.name]) for spec in names.tensors.values() if spec.name in tensors.infos]
    shapes = [f"{spec.name} {info.shape} instead of {spec.shape}" for spec, info in stored if info.shape != spec.shape]
    dtypes = [f"{spec.name} {info.dtype}" for spec, info in stored if info.dtype not in FLOATS.values()]
    problems = []
    if missing:
        problems.append(f"missing: {fold_names(missing)}")
    if unexpected:
        problems.append(f"unexpected: {fold_names(unexpected)}")
    if shapes:
        problems.append(f"wrong shape: {', '.join(shapes)}")
    if dtypes:
        problems.append(f"wrong dtype (bfloat16, float16, float32 are read): {', '.join(dtypes)}")
    if problems:
        raise InputError(
            f"{location}: the weights do not fit config.json: {'; '.join(problems)}; "
            "check that both belong to the same model"
        )


def contains_nan(array: np.ndarray) -> bool:
    """Returns whether a float array contains NaN; checks it in blocks that stay in the CPU cache."""
    flat = np.ascontiguousarray(array).reshape(-1)
    size = array.dtype.itemsize
    infinity, minus_infinity = (int(np.array(value, array.dtype).view(f"u{size}")[()]) for value in (np.inf, -np.inf))
    for start in range(0, flat.size, 2**18):
        bits = flat[start : start + 2**18]
        # The bits of NaN, as integers, are above those of infinity: as signed integers for a positive sign, as
        # unsigned ones for a negative sign.
        if bits.view(f"i{size}").max() > infinity or bits.view(f"u{size}").max() > minus_infinity:
            return True
    return False


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
