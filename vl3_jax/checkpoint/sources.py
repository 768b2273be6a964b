"""A checkpoint of any kind as the leaves of the parameter tree, to be read slice by slice."""

import abc
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import tensorstore as ts

from vl3_jax.checkpoint.hf_files import file_fingerprints, fold_names
from vl3_jax.checkpoint.names import PARTS, LeafSpec, NameMap, is_droppable, name_map
from vl3_jax.checkpoint.progress import note
from vl3_jax.checkpoint.tensors import FLOATS, TensorFiles
from vl3_jax.checkpoint.transpose import copy_view
from vl3_jax.errors import InputError
from vl3_jax.model.config import ModelConfig


class CheckpointSource(abc.ABC):
    """What `load`, `convert`, `export`, `inspect` and `verify` read from.

    Attributes:
      kind: "orbax" or a layout of the name map ("official", "native", ...).
      location: where it is, for messages.
      config: sizes; of a tower or decoder alone only that half means something.
      parts: those of `names.PARTS` that are there.
      files: local folder with config.json, tokenizer and processor files.
      files_kind: whose `config.json` lies in `files`: a layout.
      leaves: leaf path -> LeafSpec, and `dtypes`: leaf path -> dtype.
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
        """One layer of a stacked leaf, or a whole leaf (`layer` None), in the leaf's own axes; nothing read yet."""

    @abc.abstractmethod
    def fingerprints(self) -> list:
        """What a resumed job compares to know that the source is the same."""

    def read(self, leaf: str, layer: int | None, part: tuple[slice, ...], out: np.ndarray) -> None:
        """Fills `out` (C-contiguous) with the region `part` of a slice, cast to the type of `out`."""
        store = self.slice(leaf, layer)
        if store.dtype.numpy_dtype != out.dtype:
            store = ts.cast(store, ts.dtype(out.dtype.name))
        if part:
            store = store[part][ts.d[:].translate_to[0]]
        ts.array(out, copy=False).write(store).result()

    def has_nan(self, leaf: str, layer: int | None) -> bool:
        """Whether that slice holds NaN; only sources from outside are looked through."""
        return False

    @property
    def nbytes(self) -> int:
        return sum(spec.size * self.dtypes[path].itemsize for path, spec in self.leaves.items())

    @property
    def complete(self) -> bool:
        return {"vision", "projector", "llm"} <= set(self.parts)

    def fingerprint(self, **extra) -> str:
        content = json.dumps([self.kind, self.fingerprints(), sorted(extra.items())], default=str)
        return hashlib.sha256(content.encode()).hexdigest()


class TensorSource(CheckpointSource):
    """Hugging Face tensors seen through the name map."""

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
          layout: key of `names.LAYOUTS` that the names of `tensors` follow.
          tensors: the files.
          config: sizes.
          location: folder or id, for messages.
          files: folder with config.json and tokenizer.
          files_kind: layout of that config.json where it is another.
          parts: what is wanted of it; tensors of other parts are left alone.
          keep: anything that must live as long as the source does.

        Raises:
          InputError: one line with everything missing, unexpected, of a wrong shape or dtype.
        """
        self.kind, self.location, self.config, self.files = layout, location, config, files
        self.files_kind = files_kind or layout
        self.tensors, self.map = tensors, name_map(layout, config, tuple(parts))
        self._keep = keep
        self.parts = tuple(part for part in PARTS if any(spec.part == part for spec in self.map.leaves.values()))
        self.leaves = self.map.leaves
        check_tensors(tensors, self.map, config, location)
        self._places = self.map.by_place()
        self.dtypes = {path: self._leaf_dtype(spec) for path, spec in self.leaves.items()}
        self._warn_untied_head()

    def _leaf_dtype(self, spec: LeafSpec) -> np.dtype:
        found = {self.tensors.infos[tensor.name].dtype for tensor in spec.tensors}
        if len(found) == 1:
            return found.pop()
        note(f"note: {spec.path}: layers of different dtypes ({', '.join(sorted(map(str, found)))}), kept as float32")
        return np.dtype(np.float32)

    def _warn_untied_head(self) -> None:
        """Tied embeddings with a head beside them: it is dropped, which is worth a word when it is not a copy."""
        if not self.config.text.tie_word_embeddings or "lm_head.weight" not in self.tensors.infos:
            return
        embed = self._places.get(("llm/embed/embedding", None))
        if embed is None:
            return
        head, table = self.tensors.array("lm_head.weight"), self.tensors.array(embed.name)
        same = head.shape == table.shape and all(
            np.array_equal(_bits(head[start : start + 4096]), _bits(table[start : start + 4096]))
            for start in range(0, len(table), 4096)
        )
        if not same:
            note(
                f"warning: {self.location}: the configuration ties the embeddings, and lm_head.weight differs from "
                f"{embed.name}; lm_head.weight is ignored"
            )

    def slice(self, leaf: str, layer: int | None) -> ts.TensorStore:
        """See `Source.slice`."""
        spec = self._places[leaf, layer]
        return as_store(spec.to_leaf(self.tensors.array(spec.name)))

    def read(self, leaf: str, layer: int | None, part: tuple[slice, ...], out: np.ndarray) -> None:
        """See `Source.read`."""
        spec = self._places[leaf, layer]
        copy_view(out, spec.to_leaf(self.tensors.array(spec.name))[part])

    def has_nan(self, leaf: str, layer: int | None) -> bool:
        """See `Source.has_nan`."""
        return contains_nan(self.tensors.array(self._places[leaf, layer].name))

    def fingerprints(self) -> list:
        """See `Source.stamps`."""
        config = self.files / "config.json"
        return file_fingerprints([*self.tensors.paths, *([os.fspath(config)] if config.exists() else [])])


def as_store(array: np.ndarray) -> ts.TensorStore:
    """A NumPy view as a TensorStore, not copied unless its bytes are not aligned to its items."""
    if not array.flags.aligned:
        array = np.array(array)
    return ts.array(array, copy=False)


def check_tensors(tensors: TensorFiles, names: NameMap, config: ModelConfig, location: str) -> None:
    """Strict both ways: every wanted tensor is there with its shape and a float dtype, and there is no other."""
    every = name_map(names.layout, config).tensors
    missing = [name for name in names.tensors if name not in tensors.infos]
    unexpected = [name for name in tensors if name not in every and not is_droppable(name, names.layout, config)]
    here = [(spec, tensors.infos[spec.name]) for spec in names.tensors.values() if spec.name in tensors.infos]
    shapes = [f"{spec.name} {info.shape} instead of {spec.shape}" for spec, info in here if info.shape != spec.shape]
    dtypes = [f"{spec.name} {info.dtype}" for spec, info in here if info.dtype not in FLOATS.values()]
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
    """Whether a float array holds NaN, in blocks that stay in the processor's cache."""
    flat = np.ascontiguousarray(array).reshape(-1)
    size = array.dtype.itemsize
    infinity, minus_infinity = (int(np.array(value, array.dtype).view(f"u{size}")[()]) for value in (np.inf, -np.inf))
    for start in range(0, flat.size, 2**18):
        bits = flat[start : start + 2**18]
        # Read as integers, NaN is what lies above infinity: signed for positive values, unsigned for negative ones.
        if bits.view(f"i{size}").max() > infinity or bits.view(f"u{size}").max() > minus_infinity:
            return True
    return False


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
