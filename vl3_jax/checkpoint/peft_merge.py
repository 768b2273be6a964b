"""Adapters of PEFT folders, merged into their base model while it is read.

The file of weights has A [rank, in] and B [out, rank] of each adapted module, and whole tensors of the modules
that were trained whole, all under the names that the base had when it was trained.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from vl3_jax.checkpoint.names import LAYOUTS, name_map
from vl3_jax.checkpoint.peft_config import MERGE_FIRST, AdapterConfig
from vl3_jax.checkpoint.sources import refuse_problems
from vl3_jax.checkpoint.tensors import Renamed, TensorFiles, bits
from vl3_jax.errors import InputError
from vl3_jax.model.config import ModelConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names in a PEFT file
_PROJECTOR = "mm_projector.readout."  # what every name of an official projector's tensor contains
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ROWS = 1024  # of a weight that are merged at a time


@dataclasses.dataclass(frozen=True)
class _Pair:
    """The two matrices of one adapted module.

    Attributes:
      module: Name of the module in the model that was trained.
      names: Names of the tensors by side, "A" and "B".
      is_embedding: Whether the module is an embedding, whose matrices are [rank, rows] and [width, rank].
    """

    module: str
    names: dict[str, str]
    is_embedding: bool


class AdapterPairs:
    """The tensors of an adapter by what they change in its base.

    Attributes:
      whole: The tensors that replace others, under their official names.
      incomplete: Official names of weights of which only one matrix is there.
      files: Paths of the files with the tensors.
    """

    def __init__(self, adapter: TensorFiles, config: AdapterConfig):
        """Sorts the tensors.

        Args:
          adapter: Tensors of the adapter under the names in their file.
          config: Content of adapter_config.json.

        Raises:
          InputError: The adapter uses an unsupported feature.
        """
        self._adapter, self._config = adapter, config
        self.files = adapter.paths
        self._pairs: dict[str, _Pair] = {}  # by the official name of the weight
        whole = []
        for name in adapter:
            if match := re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.\w+)?", name.removesuffix(".weight")):
                module, is_embedding = match[1].removeprefix(PREFIX), match[2] is not None
                weight = official_name(f"{match[1]}.weight")
                pair = self._pairs.setdefault(weight, _Pair(module, {}, is_embedding))
                if match[3] in pair.names:
                    raise InputError(
                        f"{adapter.infos[name].file}: both {pair.names[match[3]]} and {name} adapt {weight}; "
                        "save one adapter alone"
                    )
                pair.names[match[3]] = name
            elif "lora_" in name:
                raise InputError(f"{adapter.infos[name].file}: {name} is not supported; {MERGE_FIRST}")
            else:
                whole.append(name)
        self.whole = with_official_names(adapter, whole)
        self.incomplete = [name for name, pair in self._pairs.items() if len(pair.names) < 2]

    def __iter__(self) -> Iterator[str]:
        """Yields the official names of the adapted weights."""
        return iter(self._pairs)

    def __contains__(self, name: str) -> bool:
        return name in self._pairs

    def wrong_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Returns what to say about each pair that PEFT would not make of these for a weight of that shape."""
        complete = [name for name in self._pairs if name in shapes and name not in self.incomplete]
        return [text for name in complete if (text := self._wrong_shape(name, shapes[name]))]

    def _wrong_shape(self, name: str, shape: tuple[int, ...]) -> str | None:
        pair = self._pairs[name]
        a, b = (self._adapter.infos[pair.names[side]].shape for side in "AB")
        rank, (rows, *columns) = self._config.module_rank(pair.module), shape
        expected = ((rank, *columns), (rows, rank, *[1] * len(columns[1:])))
        if pair.is_embedding:
            expected = ((rank, rows), (*columns, rank))
        return None if (a, b) == expected else f"{name} {b}x{a} for {shape} of rank {rank}"

    def factors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns a pair whose product `b @ a` is added to a weight, [rank, columns] and [rows, rank] float32."""
        pair = self._pairs[name]
        a, b = (self._adapter.array(pair.names[side]).astype(np.float32) for side in "AB")
        a, b = (b.T, a.T) if pair.is_embedding else (a.reshape(len(a), -1), b.reshape(len(b), -1))
        return a, b * np.float32(self._config.module_scale(pair.module))


class LoraMerged(TensorFiles):
    """Tensors of a base model with an adapter merged into them: `W + scale * B @ A`.

    W is the tensor of the adapter's file where it is stored whole, else that of the base. The sum is computed in
    float32 and rounded to the dtype of the base once. Only the tensor being read is in memory.
    """

    def __init__(
        self, base: TensorFiles, adapter: TensorFiles, config: AdapterConfig, model_config: ModelConfig, path: str
    ):
        """Checks the adapter against its base.

        Args:
          base: Tensors of the base model under their official names.
          adapter: Tensors of the adapter under the names in their file.
          config: Content of adapter_config.json.
          model_config: Configuration of the base model.
          path: Path of adapter_config.json, for error messages.

        Raises:
          InputError: The adapter does not fit its base or uses an unsupported feature.
        """
        self._base, self._config, self._path = base, config, path
        self._pairs = AdapterPairs(adapter, config)
        self._whole = self._pairs.whole
        self.infos = dict(base.infos)
        self.paths = (*base.paths, *adapter.paths, path)
        trained = name_map(trained_layout(adapter), model_config).leaves
        self._saved_whole = [
            name
            for name, spec in name_map("official", model_config).tensors.items()
            if name in self.infos
            and config.is_saved_whole(trained[spec.leaf].tensor(spec.layer).name.rpartition(".")[0])
        ]
        tied = model_config.text.tie_word_embeddings and _EMBEDDING in self.infos
        self._check_names(tied)
        if tied:
            self._check_tied()

    def _check_names(self, tied: bool) -> None:
        known = {*self.infos, *([_HEAD] if tied else [])}
        wrong_shape = self._pairs.wrong_shapes({name: info.shape for name, info in self.infos.items()})
        wrong_shape += [
            f"{name} {info.shape} for {self.infos[name].shape}"
            for name, info in self._whole.infos.items()
            if name in self.infos and info.shape != self.infos[name].shape
        ]
        refuse_problems(
            f"{self._path}: the adapter does not fit its base",
            {
                "not in the base": [name for name in (*self._pairs, *self._whole) if name not in known],
                "incomplete pair": self._pairs.incomplete,
                "wrong shape": wrong_shape,
                "in modules_to_save but not stored": [n for n in self._saved_whole if n not in self._whole.infos],
            },
            "check the base",
        )

    def _check_tied(self) -> None:
        """Refuses an adapter after which the head that the base ties to its embeddings would differ from them."""
        if _HEAD in self._whole.infos:
            head = self._whole.array(_HEAD).astype(self.infos[_EMBEDDING].dtype)
            apart = not np.array_equal(bits(head), bits(self.array(_EMBEDDING)))
        else:  # PEFT trains a copy of a module that it saves, and the head keeps the original
            apart = _EMBEDDING in self._saved_whole and not self._config.ensure_weight_tying
        if apart or {_HEAD, _EMBEDDING} & {*self._pairs}:
            raise InputError(
                f"{self._path}: trains one of lm_head and embed_tokens, which its base ties, apart from the other; "
                f"{MERGE_FIRST}"
            )

    def array(self, name: str) -> np.ndarray:
        unmerged = self._whole if name in self._whole.infos else self._base
        base = unmerged.array(name).astype(self.infos[name].dtype, copy=False)
        if name not in self._pairs:
            return base
        a, b = self._pairs.factors(name)
        rows, merged = base.reshape(len(base), -1), np.empty((len(base), a.shape[1]), base.dtype)
        for start in range(0, len(rows), _ROWS):
            part = slice(start, start + _ROWS)
            merged[part] = (rows[part].astype(np.float32) + b[part] @ a).astype(base.dtype)
        return merged.reshape(base.shape)


def official_name(name: str) -> str:
    """Returns the official name of a tensor of a run, without what PEFT and the official trainer add to names."""
    plain = _strip_wrappers(name)
    if (position := plain.rfind(_PROJECTOR)) >= 0:
        return f"model.{plain[position:]}"
    for layout in ("native", "official-train"):
        for part, prefix in LAYOUTS[layout].items():
            if prefix and plain.startswith(prefix):
                return LAYOUTS["official"][part] + plain[len(prefix) :]
    return plain


def trained_layout(names: Iterable[str]) -> str:
    """Returns the layout of the base that a run trained, by the names of its tensors."""
    plain = [_strip_wrappers(name) for name in names]
    for layout in ("native", "official-train"):
        own = tuple({*LAYOUTS[layout].values()} - {*LAYOUTS["official"].values()})
        if any(name.startswith(own) for name in plain):
            return layout
    return "official"


def with_official_names(tensors: TensorFiles, names: Iterable[str] | None = None) -> TensorFiles:
    """Returns tensors of a run, by default all of them, under their official names.

    PEFT's copies of the original modules are left out.

    Raises:
      InputError: Two tensors have the same official name.
    """
    found: dict[str, str] = {}
    for name in tensors if names is None else names:
        if ".original_module." in name:
            continue
        if (first := found.setdefault(official_name(name), name)) != name:
            raise InputError(
                f"{tensors.infos[name].file}: both {first} and {name} replace {official_name(name)}; save it again"
            )
    return Renamed(tensors, found)


def _strip_wrappers(name: str) -> str:
    name = re.sub(r"^base_model\.(model\.)?", "", name)
    name = re.sub(r"^(model\.)+(?=model\.)", "", name)
    return re.sub(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)", "", name)
