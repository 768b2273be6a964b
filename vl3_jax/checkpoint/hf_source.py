"""Opening a Hugging Face folder or Hub id: which layout it is, and the special things the trainers write."""

import dataclasses
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
from vl3_jax.checkpoint.progress import note
from vl3_jax.checkpoint.sidecar_files import pixel_statistics
from vl3_jax.checkpoint.sources import TensorSource
from vl3_jax.checkpoint.tensors import Overlay, Renamed, SafetensorsFile, TensorFiles
from vl3_jax.checkpoint.torch_pickle import TorchFile
from vl3_jax.errors import InputError
from vl3_jax.model.config import ModelConfig, VisionConfig

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
    """Opens a folder, a URL or a Hub id in any layout of spec A, A', B or C; nothing but headers is read.

    Args:
      source: local folder, gs:// URL, or `owner/name[@revision]`.
      parts: what is wanted of it (see `names.PARTS`).
      base: base model of an adapter or of a projector alone, where the one that its files name is elsewhere.
      token: Hub token.

    Raises:
      InputError: nothing to read there, or something that does not fit; one line.
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
    model_config = parse_config(config, config_path, _trained_tower(layout, config, tensors))
    model_config = _with_pixels(model_config, folder.local)
    return TensorSource(layout, tensors, model_config, folder.location, folder.local, parts=parts, keep=folder)


def _with_pixels(config: ModelConfig, files: pathlib.Path) -> ModelConfig:
    """`config` with the pixel mean and deviation of the processor files."""
    return dataclasses.replace(config, vision=dataclasses.replace(config.vision, **pixel_statistics(files)))


def _open_folder(source: str | os.PathLike, token: str | None) -> HfFolder:
    text = os.fspath(source)
    if not is_url(text) and not pathlib.Path(text).exists() and hub.is_hub_id(text):
        return HfFolder(hub.download(text, token))
    return HfFolder(text)


def _read_config(folder: HfFolder) -> tuple[str, dict[str, Any]]:
    if "config.json" not in folder.names:
        raise InputError(f"{folder.location}: no config.json; it belongs beside the weights")
    return folder.path("config.json"), read_json(folder.local / "config.json")


def _layout(config: Mapping[str, Any], config_path: str, tensors: TensorFiles) -> str:
    """The layout, by `model_type` and, where that leaves a choice, by the names of the tensors."""
    candidates = MODEL_TYPES[model_type_of(config, config_path)]
    vision = [LAYOUTS[layout].get("vision", "") + "embeddings.patch_embedding." for layout in candidates]
    for layout, prefix in zip(candidates, vision, strict=True):
        if any(name.startswith(prefix) for name in tensors):
            return layout
    return candidates[0]


def _trained_tower(layout: str, config: Mapping[str, Any], tensors: TensorFiles) -> VisionConfig | None:
    """Sizes of the tower for files of the official trainer, which name the tower's folder and not its sizes."""
    if config.get("vision_encoder_config") is not None or config.get("model_type") != "videollama3_qwen2":
        return None
    named = pathlib.Path(str(config.get("vision_encoder"))) / "config.json"
    if named.is_file():
        return parse_config(read_json(named), named).vision
    prefix = LAYOUTS[layout]["vision"]
    patch = tensors.infos.get(f"{prefix}embeddings.patch_embedding.weight")
    inner = tensors.infos.get(f"{prefix}encoder.layers.0.mlp.fc1.weight")
    if patch is None or inner is None or len(patch.shape) != 4 or len(inner.shape) != 2:
        return None
    pattern = re.escape(prefix) + r"encoder\.layers\.(\d+)\."
    layers = [int(found[1]) for name in tensors if (found := re.match(pattern, name))]
    heads = VisionConfig.num_heads
    if patch.shape[0] != VisionConfig.hidden_size:
        note(f"warning: {inner.file}: the tower's number of heads is stored nowhere; taken to be {heads}")
    return VisionConfig(
        hidden_size=patch.shape[0],
        intermediate_size=inner.shape[0],
        num_layers=max(layers) + 1,
        num_heads=heads,
        patch_size=patch.shape[2],
        num_channels=patch.shape[1],
    )


def _as_official(source: TensorSource) -> TensorFiles:
    """The tensors of `source` under the names of the official layout."""
    official = name_map("official", source.config, source.parts).by_place()
    return Renamed(source.tensors, {official[place].name: spec.name for place, spec in source.map.by_place().items()})


def _open_base(folder: HfFolder, config: Mapping[str, Any], base: str | None, named: Any, token) -> TensorSource:
    """The model under an adapter or projector; a bare decoder is completed with the tower that `config` names."""
    name = base or named
    if not name:
        raise InputError(f"{folder.location}: its base model is named nowhere; give it with --base")
    try:
        model = open_hf(name, base=None, token=token)
    except InputError as error:
        hint = "" if base else "; another place is given with --base"
        raise InputError(f"{folder.location}: base model: {error}{hint}") from None
    if model.kind != "qwen2":
        return model
    tower_name = config.get("vision_encoder") or config.get("mm_vision_encoder")
    if not tower_name:
        raise InputError(f"{folder.location}: its tower is named nowhere (vision_encoder in config.json); add it")
    tower = open_hf(tower_name, parts=("vision",), token=token)
    joined = Overlay([_as_official(model), _as_official(tower)])
    both = ModelConfig(tower.config.vision, model.config.text)
    there = ("vision", "llm", "head")
    return TensorSource("official", joined, both, model.location, model.files, "qwen2", there, (model, tower))


def _open_projector(folder: HfFolder, parts, base: str | None, token) -> TensorSource:
    """A run that trained the projector only: `mm_projector.bin` over the model it started from."""
    config = read_json(folder.local / "config.json") if "config.json" in folder.names else {}
    model = _open_base(folder, config, base, config.get("_name_or_path"), token)
    projector = open_file(folder, _PROJECTOR_FILE, TorchFile)
    names = {_tail(name, "mm_projector.readout."): name for name in projector}
    tensors = Overlay([_as_official(model), Renamed(projector, names)], replace=True)
    return _composed(folder, tensors, model, config, parts)


def _open_adapter(folder: HfFolder, parts, base: str | None, token) -> TensorSource:
    """A LoRA run: adapter and `non_lora_trainables.bin` over the base model."""
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
    return _composed(folder, tensors, model, config, parts)


def _composed(folder: HfFolder, tensors: TensorFiles, model: TensorSource, config: Mapping[str, Any], parts):
    """The merged model. Configuration files of the run win over those of its base where it has any."""
    own = config.get("model_type") in MODEL_TYPES
    if own:
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
    """An adapter's tensor under the official names; `.lora_A.weight` and the like stay at its end."""
    plain = _strip_tower_wrapper(peft.strip_wrappers(name))
    if base_kind == "native":
        for part, prefix in LAYOUTS["native"].items():
            if prefix and plain.startswith(prefix):
                return LAYOUTS["official"][part] + plain[len(prefix) :]
    return plain


def _tail(name: str, prefix: str) -> str:
    """`name` from the last `prefix` on, as the official layout spells it."""
    found = name.rfind(prefix)
    return f"model.{name[found:]}" if found >= 0 else name
