"""Sources: checkpoints of any kind as leaves of the parameter tree, read slice by slice."""

import abc
import collections
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from vl3_jax.checkpoint.name_specs import LeafSpec
from vl3_jax.checkpoint.names import ALL_PARTS, LAYOUTS, AnyConfig, is_droppable, name_map
from vl3_jax.checkpoint.sam2_names import SA2VA, SAM2_LAYOUTS, SAM2_PARTS
from vl3_jax.checkpoint.sidecar_files import sidecar_fingerprints
from vl3_jax.checkpoint.tensors import FLOATS, TensorFiles, copy_view, same_bits, scratch
from vl3_jax.errors import InputError
from vl3_jax.model.config import ModelConfig
from vl3_jax.sa2va.sa2va_config import Sa2vaConfig
from vl3_jax.storage.paths import file_fingerprints

logger = logging.getLogger(__name__)

Reader = Callable[[tuple[slice, ...], np.ndarray], None]

NOT_OF_SA2VA = "its language model is not VideoLLaMA3's, and text_hidden_fcs belong to that one"

_BLOCK_BYTES = 16 * 2**20  # memory of one block of a large leaf


@dataclasses.dataclass(frozen=True)
class Origin:
    """The Hugging Face model that a checkpoint has the weights of.

    Attributes:
      name: Hub id, URL or absolute path.
      layout: Layout of its tensor names.
    """

    name: str
    layout: str

    @classmethod
    def parse(cls, content: Any) -> "Origin | None":
        """Reads what `dataclasses.asdict` wrote; returns None for anything else."""
        name, layout = (content.get(key) if isinstance(content, Mapping) else None for key in ("name", "layout"))
        is_origin = isinstance(name, str) and isinstance(layout, str) and layout in (*LAYOUTS, *SAM2_LAYOUTS)
        return cls(name, layout) if is_origin else None


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
      origin: Hugging Face model that the weights are those of, up to their dtypes; None if there is none.
    """

    kind: str
    location: str
    config: AnyConfig
    parts: tuple[str, ...]
    files: pathlib.Path
    files_kind: str
    leaves: dict[str, LeafSpec]
    dtypes: dict[str, np.dtype]
    origin: Origin | None = None

    @abc.abstractmethod
    def slice(self, leaf: str, layer: int | None) -> ts.TensorStore:
        """Opens one layer of a stacked leaf, or a whole leaf if `layer` is None, with the leaf's axes."""

    @abc.abstractmethod
    def file_fingerprints(self) -> list:
        """Returns path, size and modification time of each file, which identify the source."""

    @abc.abstractmethod
    def split(self, leaf: str, layer: int | None) -> tuple[int, int]:
        """Returns the axis of a slice along which parts of it are read best, and what their size is a multiple of."""

    def reader(self, leaf: str, layer: int | None) -> Reader:
        """Opens a slice of which several regions are read; `read` describes the arguments and the errors.

        Returns:
          A function of a region of the slice and of the array to fill.
        """
        store = self.slice(leaf, layer)

        def read(region: tuple[slice, ...], out: np.ndarray) -> None:
            cast = store if store.dtype.numpy_dtype == out.dtype else ts.cast(store, ts.dtype(out.dtype.name))
            try:
                ts.array(out, copy=False).write(cast[region][ts.d[:].translate_to[0]]).result()
            except (ValueError, RuntimeError, OSError) as error:
                line = str(error).splitlines()[0]
                problem = f"{self.location}: {leaf} cannot be read ({line})"
                raise InputError(f"{problem}; convert or download it again") from None

        return read

    def read(self, leaf: str, layer: int | None, region: tuple[slice, ...], out: np.ndarray) -> None:
        """Reads a region of a slice into an array.

        Args:
          leaf: Path of the leaf.
          layer: Layer of a stacked leaf, or None.
          region: Region of the slice.
          out: Array to fill; the values are cast to its dtype.

        Raises:
          InputError: The slice is damaged or cannot be read.
        """
        self.reader(leaf, layer)(region, out)

    def read_blocks(
        self, leaf: str, layer: int | None, axis: int, chunk: int, dtype: np.dtype
    ) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """Reads a slice in blocks of whole chunks along an axis, so that each chunk is read once.

        Args:
          leaf: Path of the leaf.
          layer: Layer of a stacked leaf, or None.
          axis: Axis to divide.
          chunk: Size of a chunk along that axis.
          dtype: Type to read the values as.

        Yields:
          The region and the values of a block, in memory that the next block reuses.
        """
        shape = self.leaves[leaf].slice_shape(layer)
        row_bytes = math.prod(shape) // shape[axis] * dtype.itemsize
        step = max(chunk, _BLOCK_BYTES // row_bytes // chunk * chunk)
        for start in range(0, shape[axis], step):
            region = [slice(0, size) for size in shape]
            region[axis] = slice(start, min(start + step, shape[axis]))
            block = scratch("leaf", tuple(part.stop - part.start for part in region), dtype)
            self.read(leaf, layer, tuple(region), block)
            yield tuple(region), block

    @property
    def complete(self) -> bool:
        """Whether the checkpoint has a tower, a projector and a decoder, or all of SAM-2."""
        return any(whole <= set(self.parts) for whole in ({"vision", "projector", "llm"}, set(SAM2_PARTS)))

    def fingerprint(self, **extra) -> str:
        """Returns a hash of the source's kind and files and of the options `extra`, which identifies a job."""
        content = json.dumps([self.kind, self.file_fingerprints(), sorted(extra.items())], default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    def check_unchanged(self, fingerprint: str, options: Mapping[str, Any]) -> None:
        """Raises InputError unless the source still has the fingerprint that it had with these options."""
        if self.fingerprint(**options) != fingerprint:
            raise InputError(f"{self.location}: has changed while it was converted; run the same command again")

    def log_casts(self, dtypes: Mapping[str, np.dtype]) -> None:
        """Logs one line for each pair of dtypes that a job casts between which stores the leaves as `dtypes`."""
        pairs = [(self.dtypes[path].name, target.name) for path, target in dtypes.items()]
        for (before, after), count in collections.Counter(pairs).items():
            if before != after:
                logger.info("%d of %d leaves are cast from %s to %s", count, len(dtypes), before, after)

    def warn_nan(self, names: Collection[str]) -> None:
        """Logs a warning with the names of the tensors that contain NaN, if there are any."""
        if names:
            logger.warning(
                "warning: %s: NaN in %d of its tensors: %s", self.location, len(names), listed(sorted(names))
            )


class SourcePart(CheckpointSource):
    """Some leaves of a checkpoint as one of their own."""

    def __init__(self, whole: CheckpointSource, config: AnyConfig, prefix: str, renamed: str = ""):
        """Takes the leaves whose path begins with `prefix`, in place of which `renamed` stands.

        Args:
          whole: The checkpoint.
          config: Configuration of the part.
          prefix: Beginning of the paths.
          renamed: What they begin with here.
        """
        self._whole, self._prefix, self._renamed = whole, prefix, renamed
        self.kind, self.location, self.config = whole.kind, whole.location, config
        self.files, self.files_kind = whole.files, whole.files_kind
        found = {path: spec for path, spec in whole.leaves.items() if path.startswith(prefix)}
        self.leaves = {renamed + path.removeprefix(prefix): spec for path, spec in found.items()}
        self.dtypes = {path: whole.dtypes[self._path(path)] for path in self.leaves}
        self.parts = tuple(part for part in ALL_PARTS if any(spec.part == part for spec in found.values()))

    def _path(self, leaf: str) -> str:
        return self._prefix + leaf.removeprefix(self._renamed)

    def slice(self, leaf: str, layer: int | None) -> ts.TensorStore:
        return self._whole.slice(self._path(leaf), layer)

    def split(self, leaf: str, layer: int | None) -> tuple[int, int]:
        return self._whole.split(self._path(leaf), layer)

    def reader(self, leaf: str, layer: int | None) -> Reader:
        return self._whole.reader(self._path(leaf), layer)

    def file_fingerprints(self) -> list:
        return [self._prefix, *self._whole.file_fingerprints()]


class TensorSource(CheckpointSource):
    """Hugging Face tensors as leaves of the parameter tree, through the name map."""

    def __init__(
        self,
        layout: str,
        tensors: TensorFiles,
        config: AnyConfig,
        location: str,
        files: pathlib.Path,
        files_kind: str | None = None,
        parts: Sequence[str] = ALL_PARTS,
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
        self.files_kind, self.tensors, self._keep = files_kind or layout, tensors, keep
        names, all_names = name_map(layout, config, tuple(parts)), name_map(layout, config)
        self.leaves = names.leaves
        self.parts = tuple(part for part in ALL_PARTS if any(spec.part == part for spec in self.leaves.values()))
        ignored = {name for name in tensors if name in all_names.tensors or is_droppable(name, layout, config)}
        check_arrays(
            f"{location}: the weights do not fit config.json",
            {name: spec.shape for name, spec in names.tensors.items()},
            {name: (info.shape, info.dtype) for name, info in tensors.infos.items()},
            ignored,
        )
        self.dtypes = {path: self._leaf_dtype(spec) for path, spec in self.leaves.items()}
        for spec in names.tensors.values():
            first = self.leaves[spec.leaf].tensor(spec.layer)
            if first != spec and not same_bits(tensors.array(first.name), tensors.array(spec.name)):
                raise InputError(f"{location}: {spec.name} differs from {first.name}; the model has one of them")

    def _leaf_dtype(self, spec: LeafSpec) -> np.dtype:
        dtypes = {self.tensors.infos[tensor.name].dtype for tensor in spec.tensors}
        if len(dtypes) == 1:
            return dtypes.pop()
        names = ", ".join(sorted(map(str, dtypes)))
        logger.warning("warning: %s: layers of different dtypes (%s) are read as float32", spec.path, names)
        return np.dtype(np.float32)

    def _array(self, leaf: str, layer: int | None) -> np.ndarray:
        """Returns a slice; leaves that layouts split differently are joined or cut."""
        spec = self.leaves[leaf]
        if spec.stacked and layer is None:
            return np.stack([tensor.to_leaf(self.tensors.array(tensor.name)) for tensor in spec.tensors])
        tensor = spec.tensor(layer if spec.stacked else None)
        whole = tensor.to_leaf(self.tensors.array(tensor.name))
        return whole if spec.stacked or layer is None else whole[layer]

    def slice(self, leaf: str, layer: int | None) -> ts.TensorStore:
        # TensorStore needs items that are aligned to their size.
        return ts.array(np.require(self._array(leaf, layer), requirements="A"), copy=False)

    def split(self, leaf: str, layer: int | None) -> tuple[int, int]:
        return self.leaves[leaf].tensor(layer).outer_axis(), 1

    def reader(self, leaf: str, layer: int | None) -> Reader:
        array = self._array(leaf, layer)
        return lambda region, out: copy_view(out, array[region])

    def file_fingerprints(self) -> list:
        return [*file_fingerprints(self.tensors.paths), *sidecar_fingerprints(self.files)]


def chat_config(source: CheckpointSource) -> ModelConfig:
    """Returns the configuration of a language model; raises InputError for a checkpoint of SAM-2."""
    if isinstance(source.config, ModelConfig):
        return source.config
    if isinstance(source.config, Sa2vaConfig):
        return source.config.chat
    if source.kind == SA2VA:
        raise InputError(f"{source.location}: a Sa2VA, of which only the SAM-2 can be read: {NOT_OF_SA2VA}")
    raise InputError(f"{source.location}: a checkpoint of SAM-2, which segments and does not chat; give a VideoLLaMA3")


def check_arrays(
    title: str,
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, tuple[tuple[int, ...], np.dtype | None]],
    ignored: Collection[str] = (),
) -> None:
    """Checks that a checkpoint has exactly the expected arrays, with their shapes and float dtypes.

    Args:
      title: Location of the checkpoint and what does not fit, for the error message.
      expected: Shapes by name.
      stored: Shapes and dtypes by name; those of unexpected arrays are not looked at.
      ignored: Names that may be stored without being expected.

    Raises:
      InputError: The arrays differ; the message lists all differences.
    """
    common = {name: stored[name] for name in expected if name in stored}
    shapes = {name: shape for name, (shape, _) in common.items() if shape != expected[name]}
    dtypes = {name: dtype for name, (_, dtype) in common.items() if dtype not in FLOATS.values()}
    refuse_problems(
        title,
        {
            "missing": [name for name in expected if name not in stored],
            "unexpected": [name for name in stored if name not in expected and name not in ignored],
            "wrong shape": _fold_reasons(
                {name: f"{shape} instead of {expected[name]}" for name, shape in shapes.items()}
            ),
            "wrong dtype (bfloat16, float16, float32 are read)": _fold_reasons(dtypes),
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


def _fold_reasons(reasons: Mapping[str, object]) -> list[str]:
    """Folds the names that have the same reason, and puts it behind them."""
    names = collections.defaultdict(list)
    for name, reason in reasons.items():
        names[str(reason)].append(name)
    return [f"{fold_names(group)} {reason}" for reason, group in names.items()]


def fold_names(names: Sequence[str]) -> str:
    """Joins names and folds those that differ only in the layer: `model.layers.{0-27}.mlp.up_proj.weight`."""
    layers: dict[tuple[str, ...], list[int]] = {}
    for name in names:
        before, *rest = re.split(r"(?<=\.)(\d+)(?=\.)", name, maxsplit=1)
        layers.setdefault((before, *rest[1:]), []).extend(map(int, rest[:1]))
    return ", ".join(_ranges(numbers).join(pattern) for pattern, numbers in layers.items())


def listed(names: Sequence[str], limit: int = 8) -> str:
    """Joins the first few of many names."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _ranges(numbers: Sequence[int]) -> str:
    numbers = sorted(set(numbers))
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(pairs) for _, pairs in runs)]
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)
    return text if len(numbers) == 1 else f"{{{text}}}"
