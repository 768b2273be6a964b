"""Opens a Hugging Face folder, URL or Hub id: detects the layout and merges adapters and projector-only runs."""

import dataclasses
import logging
import os
import pathlib
import re
from collections.abc import Sequence

from vl3_jax.checkpoint import hub
from vl3_jax.checkpoint.hf_config import (
    detect_layout,
    infer_tower,
    parse_config,
    pixel_statistics,
)
from vl3_jax.checkpoint.names import LAYOUTS, PARTS, name_map
from vl3_jax.checkpoint.peft_config import MERGE_BEFORE_LOADING, AdapterConfig, parse_adapter_config
from vl3_jax.checkpoint.peft_merge import (
    ADAPTER_WEIGHTS,
    AdapterPairs,
    LoraMerged,
    trained_layout,
    with_official_names,
)
from vl3_jax.checkpoint.run_files import has_run_files, write_joined_files
from vl3_jax.checkpoint.safetensors_file import SafetensorsFile
from vl3_jax.checkpoint.sam2_hf_config import infer_sam2_config, parse_sam2_config, sam2_from_dict, sam2_layout
from vl3_jax.checkpoint.sam2_names import SA2VA, SAM2_LAYOUTS
from vl3_jax.checkpoint.sidecar_files import ADAPTER_CONFIG, CONFIG, SAM2_SECTION, download_sidecar_files
from vl3_jax.checkpoint.sources import NOT_OF_SA2VA, Origin, TensorSource, fold_names, listed
from vl3_jax.checkpoint.tensors import Overlay, Renamed, TensorFiles, same_bits
from vl3_jax.checkpoint.torch_pickle import TorchFile
from vl3_jax.errors import InputError
from vl3_jax.json_file import JsonObject, read_object
from vl3_jax.model.config import ModelConfig
from vl3_jax.sa2va.sa2va_config import Sa2vaConfig
from vl3_jax.sam2.sam2_config import sa2va_settings
from vl3_jax.storage.paths import is_url, list_dir, temporary_folder

logger = logging.getLogger(__name__)

_PROJECTOR_FILE = "mm_projector.bin"
_ADAPTER_FILES = (ADAPTER_WEIGHTS, "adapter_model.bin")
_EXTRA_FILE = "non_lora_trainables.bin"
# Stem and ending of the files of a complete model. Safetensors take precedence over pickles.
_WEIGHTS = (("model", "safetensors"), ("pytorch_model", "bin"))
_WEIGHT_FILE = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
_META_FILE = re.compile(r"sam2.*\.pt")  # of SAM-2, as Meta publishes it
_PICKLE = ".pt"
_MAX_SHARDS = 10_000
# What wrappers of torch add to the names of a model's tensors.
_WRAPPED = re.compile(r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Layouts of models that transformers loads itself; it keeps a head that differs from the embeddings it is tied to.
_TRANSFORMERS_LAYOUTS = ("native", "qwen2")


class HfFolder:
    """Hugging Face folder on a local disk or behind a URL that fsspec reads (gs://...), or a file of Meta alone.

    Attributes:
      location: Path or URL of the folder.
      names: Sorted names of the files in the folder.
      local: Local folder with the JSON and tokenizer files: the folder itself, or a temporary copy for a URL.
      name: What to find the folder by from anywhere: Hub id, URL or absolute path.
      is_file: Whether it is a file of Meta, whatever its name.
    """

    def __init__(self, source: str | os.PathLike, token: str | None = None):
        """Opens a local folder, a URL, or a Hub id, which is downloaded; raises InputError if there is none."""
        text = os.fspath(source)
        self.name = text if is_url(text) else os.path.abspath(text)
        if not is_url(text) and not os.path.exists(text) and hub.is_hub_id(text):
            self.name = text
            text = os.fspath(hub.download(text, token))
        self.location = text.rstrip("/")
        self.is_file = text.endswith(_PICKLE) and os.path.isfile(text)
        if self.is_file:
            self.location, name = os.path.split(text)
            self.location, self.names = self.location or os.curdir, [name]
            self.local = temporary_folder(self, "vl3-file-")  # what is beside it may be of another model
            return
        self.names = sorted(name for name in list_dir(self.location) if not name.startswith("."))
        if is_url(self.location):
            if not self.names:
                raise InputError(f"{source}: no such folder; check the address")
            self.local = download_sidecar_files(self, self.location, self.names)
        else:
            self.local = pathlib.Path(self.location)
            if not os.path.isdir(self.local):
                raise InputError(f"{source}: no such folder, and not a Hub id (owner/name); check the path")

    def path(self, name: str) -> str:
        return f"{self.location}/{name}"

    def open_file(self, name: str) -> TensorFiles:
        """Opens one weight file; an OSError becomes an InputError."""
        path, is_pickle = self.path(name), name.endswith((".bin", _PICKLE))
        if is_pickle and is_url(path):
            raise InputError(f"{path}: pickles are read from local folders only; copy it to a local folder first")
        try:
            return TorchFile(path) if is_pickle else SafetensorsFile(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the file") from None

    def open_weights(self) -> TensorFiles | None:
        """Opens all weights of a complete model; returns None if there are none, as in an adapter folder.

        Of several sets of weights, the one that transformers reads is read: a single file before an index, safetensors
        before pickles. Those that are passed over are logged.

        Raises:
          InputError: A shard is missing or damaged, or the index names a missing file.
        """
        if (found := self._chosen_weights()) is None:
            return None
        chosen, index = found
        if others := [name for name in self.names if _WEIGHT_FILE.fullmatch(name) and name not in (*chosen, index)]:
            logger.warning(
                "warning: %s: %s is read, and what is beside it is passed over, as transformers does: %s",
                self.location,
                index or listed(chosen),
                listed(others),
            )
        if missing := [name for name in chosen if name not in self.names]:
            named_by = index or "the numbering of the other shards"
            raise InputError(
                f"{self.location}: missing shard {listed(missing)}, named by {named_by}; download what is missing"
            )
        files = {name: self.open_file(name) for name in chosen}
        weight_map = self._weight_map(index) if index else {}
        if absent := [name for name, file in weight_map.items() if name not in files[file].infos]:
            raise InputError(
                f"{self.path(index)}: {fold_names(absent)} not in the shard that it names; download the shards again"
            )
        return Overlay(list(files.values()))

    def _chosen_weights(self) -> tuple[list[str], str] | None:
        """Returns the weight files to read and the index that names them, or ""; None if there are none."""
        for stem, ending in _WEIGHTS:
            single, index = f"{stem}.{ending}", f"{stem}.{ending}.index.json"
            shards = [name for name in self.names if re.fullmatch(rf"{stem}-\d+-of-\d+\.{ending}", name)]
            if single in self.names:
                return [single], ""
            if index in self.names:
                return sorted(set(self._weight_map(index).values())), index
            if shards:
                total = min(int(re.search(r"of-(\d+)", shards[0])[1]), _MAX_SHARDS)
                return [f"{stem}-{number:05d}-of-{total:05d}.{ending}" for number in range(1, total + 1)], ""
        of_meta = [name for name in self.names if self.is_file or _META_FILE.fullmatch(name)]
        if len(of_meta) > 1:
            raise InputError(f"{self.location}: several models of SAM-2 ({listed(of_meta)}); give one of these files")
        return (of_meta, "") if of_meta else None

    def _weight_map(self, index: str) -> dict[str, str]:
        """Returns the file of each tensor, from an index."""
        content = read_object(self.local / index, missing_ok=False)
        files = content.section("weight_map")
        if not files:
            raise InputError(f"{self.path(index)}: contains no weight_map; download the file again")
        weight_map = {name: files.text(name, "") for name in files}
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

    Only headers are read, and where a model with tied embeddings stores a head too, these two tensors.

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
    if layout := sam2_layout(read_object(folder.local / CONFIG), tensors):
        return _open_sam2(folder, layout, tensors)
    if CONFIG not in folder.names:
        raise InputError(f"{folder.location}: no {CONFIG}; put it beside the weights")
    if wrapped := next(filter(_WRAPPED.search, tensors), None):
        raise InputError(
            f"{tensors.infos[wrapped].file}: {wrapped!r} is a name of a wrapped model (DataParallel, FSDP, "
            "torch.compile); save the state dict of the model inside the wrapper"
        )
    config = read_object(folder.local / CONFIG, missing_ok=False)
    if config.get("transformers_weights") is not None:
        raise config.error("transformers_weights", "vl3 reads model.safetensors and its like; rename the file")
    layout = detect_layout(config, tensors.infos)
    model_config = parse_config(config, infer_tower(layout, config, tensors))
    vision = dataclasses.replace(model_config.vision, **pixel_statistics(folder.local))
    model_config = dataclasses.replace(model_config, vision=vision)
    if "head" in parts and not _is_tied(folder, layout, model_config, tensors):
        text = dataclasses.replace(model_config.text, tie_word_embeddings=False)
        model_config = dataclasses.replace(model_config, text=text)
    if config.get(SAM2_SECTION) is not None:
        joined = Sa2vaConfig(model_config, sam2_from_dict(config.section(SAM2_SECTION)))
        return TensorSource(f"sa2va-{layout}", tensors, joined, folder.location, folder.local, layout, keep=folder)
    opened = TensorSource(layout, tensors, model_config, folder.location, folder.local, parts=parts, keep=folder)
    opened.origin = Origin(folder.name, layout)
    return opened


def _open_sam2(folder: HfFolder, layout: str, tensors: TensorFiles) -> TensorSource:
    """Opens SAM-2; its configuration is that of config.json, or the released one that the weights are of."""
    files = folder.local
    if layout == SA2VA:
        logger.warning("warning: %s: only the SAM-2 of this Sa2VA is read; %s", folder.location, NOT_OF_SA2VA)
        prefix = SAM2_LAYOUTS[layout][1]
        tensors = Renamed(tensors, {name: name for name in tensors if name.startswith(prefix)})
        config = sa2va_settings(infer_sam2_config(tensors, folder.location, layout))
        files = temporary_folder(tensors, "vl3-sa2va-")  # those of the folder are of the language model
    elif CONFIG in folder.names:
        config = parse_sam2_config(read_object(folder.local / CONFIG))
    else:
        config = infer_sam2_config(tensors, folder.location, layout)
    config = dataclasses.replace(config, **pixel_statistics(files))
    opened = TensorSource(layout, tensors, config, folder.location, files, keep=folder)
    opened.origin = Origin(folder.name, layout)
    return opened


def _is_tied(folder: HfFolder, layout: str, config: ModelConfig, tensors: TensorFiles) -> bool:
    """Returns whether the head is the embeddings; logs a line if the configuration says so and the weights do not.

    transformers then keeps the head, and the code of the official release drops it.
    """
    head, embedding = "lm_head.weight", f"{LAYOUTS[layout].get('llm', '')}embed_tokens.weight"
    tied = config.text.tie_word_embeddings
    if not tied or "head" not in LAYOUTS[layout] or not {head, embedding} <= set(tensors.infos):
        return tied
    if same_bits(tensors.array(head), tensors.array(embedding)):
        return True
    kept = layout in _TRANSFORMERS_LAYOUTS
    logger.warning(
        "warning: %s: config.json ties the embeddings, and %s differs from %s; it is %s",
        folder.location,
        head,
        embedding,
        "kept, as transformers keeps it" if kept else "dropped, as the released code drops it",
    )
    return not kept


def _open_run(
    folder: HfFolder, parts: Sequence[str], base: str | None, token: str | None, above: tuple[str, ...]
) -> TensorSource:
    """Opens what a run adds to its base model: an adapter and `non_lora_trainables.bin`, or `mm_projector.bin`.

    Configuration, processor and tokenizer files of the run take precedence over those of its base.
    """
    config = read_object(folder.local / CONFIG)
    adapter_config = adapter = None
    path = folder.path(ADAPTER_CONFIG)
    if ADAPTER_CONFIG in folder.names:
        adapter_config, adapter = _open_adapter(folder)
        named, extra = adapter_config.base, _EXTRA_FILE
        if adapter_config.revision and hub.is_hub_id(named) and not os.path.exists(named):
            named = f"{named}@{adapter_config.revision}"
    elif _PROJECTOR_FILE in folder.names:
        named, extra = config.text("_name_or_path"), _PROJECTOR_FILE
    else:
        steps = [name for name in folder.names if re.fullmatch(r"checkpoint-\d+", name)]
        if steps:
            newest = max(steps, key=lambda name: int(name.split("-")[1]))
            raise InputError(f"{folder.location}: no weights, but {listed(steps)} in it; give {newest} of it")
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
    if config.get("model_type") is not None:
        model_config = parse_config(config, model.config.vision)
        if any(name in folder.names for name in ("tokenizer.json", "vocab.json")):
            files, files_kind = folder.local, "native" if config["model_type"] == "video_llama_3" else "official-train"
    if adapter is not None and files is model.files and has_run_files(folder.local):
        files = temporary_folder(adapter, "vl3-run-")
        keep, files_kind = [*keep, adapter], write_joined_files(folder.local, model, trained_layout(adapter), files)
    vision = dataclasses.replace(model_config.vision, **pixel_statistics(files))
    model_config = dataclasses.replace(model_config, vision=vision)
    return TensorSource("official", tensors, model_config, folder.location, files, files_kind, parts, keep=keep)


def _open_adapter(folder: HfFolder) -> tuple[AdapterConfig, TensorFiles]:
    """Returns the content of adapter_config.json and the tensors beside it, under the names in their file."""
    path = folder.path(ADAPTER_CONFIG)
    config = parse_adapter_config(JsonObject(read_object(folder.local / ADAPTER_CONFIG, missing_ok=False), path))
    adapter = next((folder.open_file(name) for name in _ADAPTER_FILES if name in folder.names), None)
    if adapter is None:
        raise InputError(f"{path}: there is no {ADAPTER_WEIGHTS} beside it; download it too")
    return config, adapter


def open_adapter(source: str | os.PathLike, token: str | None = None) -> AdapterPairs:
    """Opens the adapter of a PEFT folder without its base.

    Args:
      source: Local folder, gs:// URL, or `owner/name[@revision]`.
      token: Hub token.

    Raises:
      InputError: There is no adapter, it is not supported, or modules beside it were trained whole.
    """
    folder = HfFolder(source, token)
    if ADAPTER_CONFIG not in folder.names:
        raise InputError(
            f"{folder.location}: no {ADAPTER_CONFIG}, so no adapter of PEFT; `vl3 convert export RUN DST "
            "--format peft` writes that of a run"
        )
    config, adapter = _open_adapter(folder)
    pairs = AdapterPairs(adapter, config)
    if whole := [*pairs.whole, *([_EXTRA_FILE] if _EXTRA_FILE in folder.names else [])]:
        raise InputError(f"{folder.location}: has {whole[0]}, which was trained whole; {MERGE_BEFORE_LOADING}")
    return pairs


def _open_base(
    folder: HfFolder, config: JsonObject, base: str | None, named: str | None, token, above: tuple[str, ...]
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
    tower_name = config.text("vision_encoder") or config.text("mm_vision_encoder")
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
