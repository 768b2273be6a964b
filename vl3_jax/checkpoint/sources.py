"""Sources: checkpoints of any kind as leaves of the parameter tree, read slice by slice."""

import abc
import collections
import hashlib
import json
import logging
import os
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import tensorstore as ts

from vl3_jax.checkpoint.names import PARTS, LeafSpec, NameMap, is_droppable, name_map
from vl3_jax.checkpoint.tensors import FLOATS, TensorFiles, bits, contains_nan, copy_view
from vl3_jax.errors import InputError
from vl3_jax.model.config import ModelConfig
from vl3_jax.storage.paths import file_fingerprints

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
    def complete(self) -> bool:
        """Whether the checkpoint has a tower, a projector and a decoder."""
        return {"vision", "projector", "llm"} <= set(self.parts)

    def fingerprint(self, **extra) -> str:
        """Returns a hash of the source's kind and files and of the options `extra`, which identifies a job."""
        content = json.dumps([self.kind, self.file_fingerprints(), sorted(extra.items())], default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    def log_casts(self, dtypes: Mapping[str, np.dtype]) -> None:
        """Logs one line for each pair of dtypes that a job casts between which stores the leaves as `dtypes`."""
        pairs = [(self.dtypes[path].name, target.name) for path, target in dtypes.items()]
        for (before, after), count in collections.Counter(pairs).items():
            if before != after:
                logger.info("%d of %d leaves are cast from %s to %s", count, len(dtypes), before, after)

    def warn_nan(self, names: Collection[str]) -> None:
        """Logs a warning with the names of the tensors that contain NaN, if there are any."""
        if names:
            listed = ", ".join(sorted(names)[:8]) + (" ..." if len(names) > 8 else "")
            logger.warning("warning: %s: NaN in %d of its tensors: %s", self.location, len(names), listed)


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
            np.array_equal(bits(head[start : start + 4096]), bits(table[start : start + 4096]))
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
        # TensorStore needs items that are aligned to their size.
        return ts.array(np.require(spec.to_leaf(self.tensors.array(spec.name)), requirements="A"), copy=False)

    def read(self, leaf: str, layer: int | None, region: tuple[slice, ...], out: np.ndarray) -> None:
        spec = self._specs[leaf, layer]
        copy_view(out, spec.to_leaf(self.tensors.array(spec.name))[region])

    def has_nan(self, leaf: str, layer: int | None) -> bool:
        return contains_nan(self.tensors.array(self._specs[leaf, layer].name))

    def file_fingerprints(self) -> list:
        config = self.files / "config.json"
        return file_fingerprints([*self.tensors.paths, *([os.fspath(config)] if config.exists() else [])])


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
    refuse_problems(
        f"{location}: the weights do not fit config.json",
        {
            "missing": missing,
            "unexpected": unexpected,
            "wrong shape": shapes,
            "wrong dtype (bfloat16, float16, float32 are read)": dtypes,
        },
        "check that both belong to the same model",
    )


def refuse_problems(title: str, problems: Mapping[str, Sequence[str]], advice: str) -> None:
    """Raises InputError with all problems in one line, unless there are none.

    Args:
      title: What does not fit.
      problems: Names by what is wrong with them.
      advice: What to do.
    """
    found = [f"{label}: {fold_names(names)}" for label, names in problems.items() if names]
    if found:
        raise InputError(f"{title}: {'; '.join(found)}; {advice}")


def fold_names(names: Sequence[str]) -> str:
    """Joins names and folds those that differ only in the layer: `model.layers.{0-27}.mlp.up_proj.weight`."""
    groups: dict[str, list[int]] = {}
    for name in names:
        match = re.search(r"\.(\d+)\.", name)
        pattern = f"{name[: match.start()]}.{{}}.{name[match.end() :]}" if match else name
        groups.setdefault(pattern, []).extend([int(match[1])] if match else [])
    return ", ".join(pattern.replace("{}", _ranges(numbers), 1) for pattern, numbers in groups.items())


def _ranges(numbers: Sequence[int]) -> str:
    numbers = sorted(set(numbers))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"
