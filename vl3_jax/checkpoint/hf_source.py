"""Opens a Hugging Face folder, URL or Hub id: detects the layout and merges adapters and projector-only runs."""

import dataclasses
import logging
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vl3_jax.checkpoint import hub, peft
from vl3_jax.checkpoint.hf_config import MODEL_TYPES, model_type_of, parse_config, read_json
from vl3_jax.checkpoint.hf_files import HfFolder, open_file, open_weights
from vl3_jax.checkpoint.names import LAYOUTS, PARTS, name_map
from vl3_jax.checkpoint.paths import is_url
from vl3_jax.checkpoint.sidecar_files import pixel_statistics
from vl3_jax.checkpoint.sources import TensorSource
from vl3_jax.checkpoint.tensors import Overlay, Renamed, SafetensorsFile, TensorFiles
from vl3_jax.checkpoint.torch_pickle import TorchFile
from vl3_jax.errors import InputError
from vl3_jax.model.config import ModelConfig, VisionConfig

logger = logging.getLogger(__name__)

_PROJECTOR_FILE = "mm_projector.bin"
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_FILES = (("adapter_model.safetensors", SafetensorsFile), ("adapter_model.bin", TorchFile))
_EXTRA_FILE = "non_lora_trainables.bin"


def open_hf(
    source: str | os.PathLike,
    parts: Sequence[str] = PARTS,
    base: str | None = None,
    token: str | None = None,
) -> TensorSource:
    """Opens a Hugging Face folder, URL or Hub id in any layout of `names.LAYOUTS`, or a LoRA or projector-only run.

    Only headers are read.

    Args:
      source: Local folder, gs:// URL, or `owner/name[@revision]`.
      parts: Parts of the model to open; see `names.PARTS`.
      base: Base model of an adapter or of a projector-only run, in place of the one that its files name.
      token: Hub token.

    Raises:
      InputError: The source has no readable weights, or its tensors do not fit its configuration.
    """
    folder = _open_folder(source, token)
    if _ADAPTER_CONFIG in folder.names:
        return _open_adapter(folder, parts, base, token)
    tensors = open_weights(folder)
    if tensors is None:
        if _PROJECTOR_FILE in folder.names:
            return _open_projector(folder, parts, base, token)
        raise InputError(
            f"{folder.location}: no weights: expected model.safetensors, its index or pytorch_model.bin; check the path"
        )
    config_path, config = _read_config(folder)
    layout = _layout(config, config_path, tensors)
    model_config = parse_config(config, config_path, _infer_tower_config(layout, config, tensors))
    model_config = _with_pixel_statistics(model_config, folder.local)
    return TensorSource(layout, tensors, model_config, folder.location, folder.local, parts=parts, keep=folder)


def _with_pixel_statistics(config: ModelConfig, files: pathlib.Path) -> ModelConfig:
    """Returns `config` with the pixel mean and standard deviation of the processor files."""
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, **pixel_statistics(files)))


def _open_folder(source: str | os.PathLike, token: str | None) -> HfFolder:
    text = os.fspath(source)
    if not is_url(text) and not pathlib.Path(text).exists() and hub.is_hub_id(text):
        return HfFolder(hub.download(text, token))
    return HfFolder(text)


def _read_config(folder: HfFolder) -> tuple[str, dict[str, Any]]:
    if "config.json" not in folder.names:
        raise InputError(f"{folder.location}: no config.json; put it beside the weights")
    return folder.path("config.json"), read_json(folder.local / "config.json")


def _layout(config: Mapping[str, Any], config_path: str, tensors: TensorFiles) -> str:
    """Detects the layout from `model_type` and, where several layouts share it, from the tensor names."""
    candidates = MODEL_TYPES[model_type_of(config, config_path)]
    vision = [LAYOUTS[layout].get("vision", "") + "embeddings.patch_embedding." for layout in candidates]
    for layout, prefix in zip(candidates, vision, strict=True):
        if any(name.startswith(prefix) for name in tensors):
            return layout
    return candidates[0]


def _infer_tower_config(layout: str, config: Mapping[str, Any], tensors: TensorFiles) -> VisionConfig | None:
    """Infers the tower configuration for files of the official trainer, which name the tower's folder, not its sizes.

    Returns:
      None where `config` describes the tower itself or its weights are missing.
    """
    if config.get("vision_encoder_config") is not None or config.get("model_type") != "videollama3_qwen2":
        return None
    config_path = pathlib.Path(str(config.get("vision_encoder"))) / "config.json"
    if config_path.is_file():
        return parse_config(read_json(config_path), config_path).vision
    prefix = LAYOUTS[layout]["vision"]
    patch_embed = tensors.infos.get(f"{prefix}embeddings.patch_embedding.weight")
    fc1 = tensors.infos.get(f"{prefix}encoder.layers.0.mlp.fc1.weight")
    if patch_embed is None or fc1 is None or len(patch_embed.shape) != 4 or len(fc1.shape) != 2:
        return None
    pattern = re.escape(prefix) + r"encoder\.layers\.(\d+)\."
    layers = [int(match[1]) for name in tensors if (match := re.match(pattern, name))]
    heads = VisionConfig.num_heads
    if patch_embed.shape[0] != VisionConfig.hidden_size:
        logger.warning(
            "warning: %s: the tower's number of heads is not stored in the checkpoint; assuming %d", fc1.file, heads
        )
    return VisionConfig(
        hidden_size=patch_embed.shape[0],
        intermediate_size=fc1.shape[0],
        num_layers=max(layers) + 1,
        num_heads=heads,
        patch_size=patch_embed.shape[2],
        num_channels=patch_embed.shape[1],
    )


def _as_official(source: TensorSource) -> TensorFiles:
    """Returns the tensors of `source` under the names of the official layout."""
    official = name_map("official", source.config, source.parts).by_leaf()
    return Renamed(source.tensors, {official[key].name: spec.name for key, spec in source.map.by_leaf().items()})


def _open_base(folder: HfFolder, config: Mapping[str, Any], base: str | None, named: Any, token) -> TensorSource:
    """Opens the base model of an adapter or projector; a decoder alone is joined with the tower that `config` names."""
    name = base or named
    if not name:
        raise InputError(f"{folder.location}: its files name no base model; give it with --base")
    try:
        model = open_hf(name, base=None, token=token)
    except InputError as error:
        hint = "" if base else "; give another base model with --base"
        raise InputError(f"{folder.location}: base model: {error}{hint}") from None
    if model.kind != "qwen2":
        return model
    tower_name = config.get("vision_encoder") or config.get("mm_vision_encoder")
    if not tower_name:
        raise InputError(f"{folder.location}: config.json names no tower; add vision_encoder to it")
    tower = open_hf(tower_name, parts=("vision",), token=token)
    tensors = Overlay([_as_official(model), _as_official(tower)])
    model_config = ModelConfig(tower.config.vision, model.config.text)
    parts = ("vision", "llm", "head")
    return TensorSource("official", tensors, model_config, model.location, model.files, "qwen2", parts, (model, tower))


def _open_projector(folder: HfFolder, parts, base: str | None, token) -> TensorSource:
    """Opens a projector-only run: `mm_projector.bin` over its base model."""
    config = read_json(folder.local / "config.json") if "config.json" in folder.names else {}
    model = _open_base(folder, config, base, config.get("_name_or_path"), token)
    projector = open_file(folder, _PROJECTOR_FILE, TorchFile)
    names = {_official_suffix(name, "mm_projector.readout."): name for name in projector}
    tensors = Overlay([_as_official(model), Renamed(projector, names)], replace=True)
    return _compose(folder, tensors, model, config, parts)


def _open_adapter(folder: HfFolder, parts, base: str | None, token) -> TensorSource:
    """Opens a LoRA run: the adapter and `non_lora_trainables.bin` over the base model."""
    path = folder.local / _ADAPTER_CONFIG
    adapter_config = peft.read_adapter_config(path)
    config = read_json(folder.local / "config.json") if "config.json" in folder.names else {}
    model = _open_base(folder, config, base, adapter_config.get("base_model_name_or_path"), token)
    tensors = _as_official(model)
    if _EXTRA_FILE in folder.names:
        extra = open_file(folder, _EXTRA_FILE, TorchFile)
        names = {_strip_tower_wrapper(peft.strip_wrappers(name)): name for name in extra}
        tensors = Overlay([tensors, Renamed(extra, names)], replace=True)
    for name, reader in _ADAPTER_FILES:
        if name in folder.names:
            adapter = open_file(folder, name, reader)
            adapter = Renamed(adapter, {_official_adapter_name(name, model.kind): name for name in adapter})
            tensors = peft.LoraMerged(tensors, adapter, adapter_config, path)
            break
    else:
        raise InputError(f"{folder.location}: adapter_config.json without adapter_model.safetensors; download it too")
    return _compose(folder, tensors, model, config, parts)


def _compose(folder: HfFolder, tensors: TensorFiles, model: TensorSource, config: Mapping[str, Any], parts):
    """Returns the merged model. Configuration files of the run take precedence over those of its base."""
    if config.get("model_type") in MODEL_TYPES:
        model_config = parse_config(config, folder.path("config.json"), model.config.vision)
        has_tokenizer = any(name in folder.names for name in ("tokenizer.json", "vocab.json"))
        files, files_kind = (folder, "official-train") if has_tokenizer else (model, model.files_kind)
        files = files.local if isinstance(files, HfFolder) else files.files
    else:
        model_config, files, files_kind = model.config, model.files, model.files_kind
    return TensorSource(
        "official", tensors, model_config, folder.location, files, files_kind, parts, keep=(folder, model)
    )


def _strip_tower_wrapper(name: str) -> str:
    trained, official = LAYOUTS["official-train"]["vision"], LAYOUTS["official"]["vision"]
    return official + name[len(trained) :] if name.startswith(trained) else name


def _official_adapter_name(name: str, base_kind: str) -> str:
    """Returns the official name of an adapter tensor; a suffix such as `.lora_A.weight` is kept."""
    plain = _strip_tower_wrapper(peft.strip_wrappers(name))
    if base_kind == "native":
        for part, prefix in LAYOUTS["native"].items():
            if prefix and plain.startswith(prefix):
                return LAYOUTS["official"][part] + plain[len(prefix) :]
    return plain


def _official_suffix(name: str, prefix: str) -> str:
    """Returns the official name for `name` from the last occurrence of `prefix` on."""
    position = name.rfind(prefix)
    return f"model.{name[position:]}" if position >= 0 else name
