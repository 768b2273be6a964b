"""Opens a Hugging Face folder, URL or Hub id: detects the layout and merges adapters and projector-only runs."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vl3_jax.checkpoint import hub
from vl3_jax.checkpoint.hf_config import (
    MODEL_TYPES,
    detect_layout,
    infer_tower,
    parse_config,
    pixel_statistics,
    read_object,
)
from vl3_jax.checkpoint.names import PARTS, name_map
from vl3_jax.checkpoint.peft_config import parse_adapter_config
from vl3_jax.checkpoint.peft_merge import ADAPTER_WEIGHTS, LoraMerged, trained_layout, with_official_names
from vl3_jax.checkpoint.run_files import has_run_files, write_joined_files
from vl3_jax.checkpoint.sidecar_files import ADAPTER_CONFIG, CONFIG, download_sidecar_files
from vl3_jax.checkpoint.sources import Origin, TensorSource, fold_names
from vl3_jax.checkpoint.tensors import Overlay, Renamed, SafetensorsFile, TensorFiles
from vl3_jax.checkpoint.torch_pickle import TorchFile
from vl3_jax.errors import InputError
from vl3_jax.model.config import ModelConfig
from vl3_jax.storage.paths import is_url, list_dir, read_json, temporary_folder

_PROJECTOR_FILE = "mm_projector.bin"
_ADAPTER_FILES = (ADAPTER_WEIGHTS, "adapter_model.bin")
_EXTRA_FILE = "non_lora_trainables.bin"
# Stem and ending of the files of a complete model. Safetensors take precedence over pickles.
_WEIGHTS = (("model", "safetensors"), ("pytorch_model", "bin"))


class HfFolder:
    """Hugging Face folder on a local disk or behind a URL that fsspec reads (gs://...).

    Attributes:
      location: Path or URL of the folder.
      names: Sorted names of the files in the folder.
      local: Local folder with the JSON and tokenizer files: the folder itself, or a temporary copy for a URL.
      name: What to find the folder by from anywhere: Hub id, URL or absolute path.
    """

    def __init__(self, source: str | os.PathLike, token: str | None = None):
        """Opens a local folder, a URL, or a Hub id, which is downloaded; raises InputError if there is none."""
        text = os.fspath(source)
        self.name = text if is_url(text) else os.path.abspath(text)
        if not is_url(text) and not pathlib.Path(text).exists() and hub.is_hub_id(text):
            self.name = text
            text = os.fspath(hub.download(text, token))
        self.location = text.rstrip("/")
        self.names = sorted(name for name in list_dir(self.location) if not name.startswith("."))
        if is_url(self.location):
            if not self.names:
                raise InputError(f"{source}: no such folder; check the address")
            self.local = download_sidecar_files(self, self.location, self.names)
        else:
            self.local = pathlib.Path(self.location)
            if not self.local.is_dir():
                raise InputError(f"{source}: no such folder, and not a Hub id (owner/name); check the path")

    def path(self, name: str) -> str:
        return f"{self.location}/{name}"

    def open_file(self, name: str) -> TensorFiles:
        """Opens one weight file; an OSError becomes an InputError."""
        path, is_pickle = self.path(name), name.endswith(".bin")
        if is_pickle and is_url(path):
            raise InputError(f"{path}: pickles are read from local folders only; copy it to a local folder first")
        try:
            return TorchFile(path) if is_pickle else SafetensorsFile(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the file") from None

    def open_weights(self) -> TensorFiles | None:
        """Opens all weights of a complete model; returns None if there are none, as in an adapter folder.

        An index takes precedence over a single file.

        Raises:
          InputError: A shard is missing or damaged, or the index names a missing file.
        """
        for stem, ending in _WEIGHTS:
            index, weight_map = f"{stem}.{ending}.index.json", {}
            shards = [name for name in self.names if re.fullmatch(rf"{stem}-\d+-of-\d+\.{ending}", name)]
            if index in self.names:
                weight_map = self._weight_map(index)
                expected, named_by = sorted(set(weight_map.values())), index
            elif f"{stem}.{ending}" in self.names:
                expected, named_by = [f"{stem}.{ending}"], ""
            elif shards:
                total = int(re.search(r"of-(\d+)", shards[0])[1])
                expected = [f"{stem}-{number:05d}-of-{total:05d}.{ending}" for number in range(1, total + 1)]
                named_by = "the numbering of the other shards"
            else:
                continue
            if missing := [name for name in expected if name not in self.names]:
                raise InputError(
                    f"{self.location}: missing shard {', '.join(missing)}, named by {named_by}; "
                    "download what is missing"
                )
            files = {name: self.open_file(name) for name in expected}
            if absent := [name for name, file in weight_map.items() if name not in files[file].infos]:
                raise InputError(
                    f"{self.path(index)}: {fold_names(absent)} not in the shard that it names; "
                    "download the shards again"
                )
            return Overlay(list(files.values()))
        return None

    def _weight_map(self, index: str) -> dict[str, str]:
        """Returns the file of each tensor, from an index."""
        content = read_json(self.local / index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise InputError(f"{self.path(index)}: contains no weight_map; download the file again")
        if outside := [name for name in sorted(weight_map.values()) if "/" in name or name.startswith("..")]:
            raise InputError(f"{self.path(index)}: names {outside[0]!r} outside its folder; download the file again")
        return weight_map


def open_hf(
    source: str | os.PathLike,
    parts: Sequence[str] = PARTS,
    base: str | None = None,
    token: str | None = None,
    above: tuple[str, ...] = (),
) -> TensorSource:
    """Opens a Hugging Face folder, URL or Hub id in any layout of `names.LAYOUTS`, or a LoRA or projector-only run.

    Only headers are read.

    Args:
      source: Local folder, gs:// URL, or `owner/name[@revision]`.
      parts: Parts of the model to open; see `names.PARTS`.
      base: Base model of an adapter or of a projector-only run, in place of the one that its files name.
      token: Hub token.
      above: Names of the runs that this is the base of.

    Raises:
      InputError: The source has no readable weights, is a base of itself, or its tensors do not fit its configuration.
    """
    folder = HfFolder(source, token)
    tensors = None if ADAPTER_CONFIG in folder.names else folder.open_weights()
    if tensors is None:
        if folder.name in above:
            raise InputError(f"{folder.location}: is an adapter of itself; give its base with --base")
        return _open_run(folder, parts, base, token, (*above, folder.name))
    if CONFIG not in folder.names:
        raise InputError(f"{folder.location}: no {CONFIG}; put it beside the weights")
    path, config = folder.path(CONFIG), read_json(folder.local / CONFIG)
    layout = detect_layout(config, path, tensors.infos)
    model_config = parse_config(config, path, infer_tower(layout, config, tensors))
    vision = dataclasses.replace(model_config.vision, **pixel_statistics(folder.local))
    model_config = dataclasses.replace(model_config, vision=vision)
    opened = TensorSource(layout, tensors, model_config, folder.location, folder.local, parts=parts, keep=folder)
    opened.origin = Origin(folder.name, layout)
    return opened


def _open_run(
    folder: HfFolder, parts: Sequence[str], base: str | None, token: str | None, above: tuple[str, ...]
) -> TensorSource:
    """Opens what a run adds to its base model: an adapter and `non_lora_trainables.bin`, or `mm_projector.bin`.

    Configuration, processor and tokenizer files of the run take precedence over those of its base.
    """
    config = read_object(folder.local / CONFIG)
    adapter_config = adapter = None
    if ADAPTER_CONFIG in folder.names:
        path = folder.path(ADAPTER_CONFIG)
        adapter_config = parse_adapter_config(read_json(folder.local / ADAPTER_CONFIG), path)
        named, extra = adapter_config.base, _EXTRA_FILE
        if adapter_config.revision and hub.is_hub_id(named) and not os.path.exists(named):
            named = f"{named}@{adapter_config.revision}"
        adapter = next((folder.open_file(name) for name in _ADAPTER_FILES if name in folder.names), None)
        if adapter is None:
            raise InputError(f"{path}: there is no {ADAPTER_WEIGHTS} beside it; download it too")
    elif _PROJECTOR_FILE in folder.names:
        named, extra = config.get("_name_or_path"), _PROJECTOR_FILE
    else:
        raise InputError(
            f"{folder.location}: no weights: expected model.safetensors, its index or pytorch_model.bin; check the path"
        )
    model = _open_base(folder, config, base, named, token, above)
    tensors = as_official(model)
    if extra in folder.names:
        tensors = Overlay([tensors, with_official_names(folder.open_file(extra))], replace=True)
    if adapter_config is not None:
        tensors = LoraMerged(tensors, adapter, adapter_config, model.config, path)
    keep, model_config, files, files_kind = [folder, model], model.config, model.files, model.files_kind
    if config.get("model_type") in MODEL_TYPES:
        model_config = parse_config(config, folder.path(CONFIG), model.config.vision)
        if any(name in folder.names for name in ("tokenizer.json", "vocab.json")):
            files, files_kind = folder.local, "native" if config["model_type"] == "video_llama_3" else "official-train"
    if adapter is not None and files is model.files and has_run_files(folder.local):
        files = temporary_folder(adapter, "vl3-run-")
        keep, files_kind = [*keep, adapter], write_joined_files(folder.local, model, trained_layout(adapter), files)
    vision = dataclasses.replace(model_config.vision, **pixel_statistics(files))
    model_config = dataclasses.replace(model_config, vision=vision)
    return TensorSource("official", tensors, model_config, folder.location, files, files_kind, parts, keep=keep)


def _open_base(
    folder: HfFolder, config: Mapping[str, Any], base: str | None, named: Any, token, above: tuple[str, ...]
) -> TensorSource:
    """Opens the base model of an adapter or projector; a decoder alone is joined with the tower that `config` names."""
    name = base or named
    if not name:
        raise InputError(f"{folder.location}: its files name no base model; give it with --base")
    try:
        model = open_hf(name, token=token, above=above)
    except InputError as error:
        hint = "" if base else "; give another base model with --base"
        raise InputError(f"{folder.location}: base model: {error}{hint}") from None
    if model.kind != "qwen2":
        return model
    tower_name = config.get("vision_encoder") or config.get("mm_vision_encoder")
    if not tower_name:
        raise InputError(f"{folder.location}: config.json names no tower; add vision_encoder to it")
    tower = open_hf(tower_name, parts=("vision",), token=token, above=above)
    tensors = Overlay([as_official(model), as_official(tower)])
    model_config = ModelConfig(tower.config.vision, model.config.text)
    parts = ("vision", "llm", "head")
    return TensorSource("official", tensors, model_config, model.location, model.files, "qwen2", parts, (model, tower))


def as_official(source: TensorSource) -> TensorFiles:
    """Returns the tensors of `source` under the names of the official layout."""
    official = name_map("official", source.config, source.parts).tensors.values()
    names = {spec.name: source.leaves[spec.leaf].tensor(spec.layer).name for spec in official}
    return Renamed(source.tensors, names)
