"""Sidecar files, the small files beside the weights: which of them travel, and how their keys map between layouts.

The tables are like that of the tensor names: `SIDECAR_FILES` lists the files, `SETTINGS` the keys that the official and
the native layout store in different places, and `_CONSTANTS` what every file of a layout says.
"""

import dataclasses
import json
import logging
import os
import pathlib
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from vl3_jax.checkpoint import tokenizer_files
from vl3_jax.checkpoint.hf_config import image_processor, text_section, vision_section
from vl3_jax.checkpoint.sam2_hf_config import config_differences, parse_sam2_config, sam2_config_json
from vl3_jax.errors import InputError
from vl3_jax.json_file import JsonObject, read_object
from vl3_jax.model.config import ModelConfig
from vl3_jax.sam2.sam2_config import Sam2Config
from vl3_jax.storage.paths import open_url, temporary_folder, translate_io_errors

logger = logging.getLogger(__name__)

CONFIG = "config.json"
IMAGE = "preprocessor_config.json"
VIDEO = "video_preprocessor_config.json"
PROCESSOR = "processor_config.json"
# The files that travel with the weights, and whether they are the same in every layout; the others are converted.
SIDECAR_FILES: dict[str, bool] = {
    CONFIG: False,
    "generation_config.json": True,
    IMAGE: False,
    VIDEO: False,
    PROCESSOR: False,
    "chat_template.json": False,
    "chat_template.jinja": False,
    "tokenizer.json": True,
    "tokenizer_config.json": True,
    "tokenizer.model": True,
    "vocab.json": True,
    "merges.txt": True,
    "added_tokens.json": True,
    "special_tokens_map.json": True,
}
ADAPTER_CONFIG = "adapter_config.json"
SAM2_SECTION = "sam2_config"  # of config.json, where a language model has a SAM-2

# Setting, its default, its file and key in the official layout, its file and key in the native layout.
SETTINGS: tuple[tuple[str, Any, tuple[str, str], tuple[str, str]], ...] = (
    ("image_merge", 1, (PROCESSOR, "image_merge_size"), (IMAGE, "merge_size")),
    ("video_merge", 2, (PROCESSOR, "video_merge_size"), (VIDEO, "merge_size")),
    ("fps", 1.0, (PROCESSOR, "fps"), (VIDEO, "fps")),
    ("max_frames", 180, (PROCESSOR, "max_frames"), (VIDEO, "max_frames")),
    ("compress", True, (CONFIG, "use_token_compression"), (VIDEO, "use_token_compression")),
    ("min_tokens", 16, (IMAGE, "min_tokens"), (IMAGE, "min_pixels")),
    ("max_tokens", 16_384, (IMAGE, "max_tokens"), (IMAGE, "max_pixels")),
)
# Settings of the image processor under the same keys in both layouts, and their defaults.
_PIXEL_SETTINGS = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
}
_CONSTANTS: dict[str, dict[str, dict[str, Any]]] = {
    "official": {
        CONFIG: {
            "architectures": ["Videollama3Qwen2ForCausalLM"],
            "model_type": "videollama3_qwen2",
            "mm_projector_type": "mlp2x_gelu",
            "vision_encoder": None,
        },
        IMAGE: {
            "image_processor_type": "Videollama3ImageProcessor",
            "processor_class": "Videollama3Qwen2Processor",
        },
        PROCESSOR: {"processor_class": "Videollama3Qwen2Processor"},
    },
    "native": {
        CONFIG: {"architectures": ["VideoLlama3ForConditionalGeneration"], "model_type": "video_llama_3"},
        IMAGE: {
            "image_processor_type": "VideoLlama3ImageProcessor",
            "processor_class": "VideoLlama3Processor",
            "temporal_patch_size": 1,
        },
        VIDEO: {
            "video_processor_type": "VideoLlama3VideoProcessor",
            "processor_class": "VideoLlama3Processor",
            "temporal_patch_size": 1,
            "min_frames": 4,
            "do_sample_frames": False,
            "return_metadata": True,
        },
        PROCESSOR: {"processor_class": "VideoLlama3Processor"},
    },
}
# Keys of the decoder that `ModelConfig` does not cover and that both layouts have.
_SHARED_TEXT_KEYS = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "max_window_layers",
    "rope_scaling",
    "sliding_window",
    "use_cache",
    "use_sliding_window",
)
# Keys that the official trainer writes to config.json and released models do not have.
_TRAINER_KEYS = (
    "image_token_length",
    "is_alignment",
    "llm_lr",
    "max_frames",
    "mm_hidden_size",
    "mm_projector_lr",
    "mm_vision_encoder",
    "tokenizer_model_max_length",
    "use_flash_loss",
    "use_mm_proj",
    "vision_encoder_lr",
)
_OFFICIAL_IMAGE_ID, _NATIVE_IMAGE_ID, _NATIVE_VIDEO_ID = 151_665, 151_655, 151_656  # of the released tokenizers


def copy_sidecar_files(source: str | os.PathLike, target: str | os.PathLike) -> list[str]:
    """Copies the sidecar files of the local folder `source` to the folder `target`, byte for byte.

    Returns:
      The names of the files.
    """
    target, files = epath.Path(target), _read_files(pathlib.Path(source), SIDECAR_FILES)
    target.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (target / name).write_bytes(content)
    return list(files)


def sidecar_fingerprints(files: pathlib.Path) -> list[list]:
    """Returns [name, checksum] of each sidecar file, which a resumed job compares with its own."""
    return [[name, zlib.crc32(content)] for name, content in _read_files(files, SIDECAR_FILES).items()]


def download_sidecar_files(owner: object, url: str | os.PathLike, names: Iterable[str]) -> pathlib.Path:
    """Copies those of the files `names` behind a URL that are no weights to a folder that lives as long as `owner`."""
    folder = temporary_folder(owner, "vl3-remote-")
    filesystem, key = open_url(url)
    with translate_io_errors(url):
        for name in names:
            if name in (*SIDECAR_FILES, ADAPTER_CONFIG) or name.endswith(".index.json"):
                filesystem.get_file(f"{key.rstrip('/')}/{name}", os.fspath(folder / name))
    return folder


def export_sidecar_files(
    files: pathlib.Path, files_kind: str, config: ModelConfig, layout: str, dtype: str
) -> dict[str, bytes]:
    """Returns the sidecar files of a checkpoint exported in `layout`.

    Args:
      files: Folder with the sidecar files of the source.
      files_kind: Layout of the config.json in `files`.
      config: Configuration of the model.
      layout: Layout of the export, "official" or "native".
      dtype: Name of the dtype of the weights, which config.json states.

    Returns:
      Content by file name. Files of the same layout are unchanged except for the dtype.

    Raises:
      InputError: A file is damaged, or the tokenizer has ids beyond the embedding table.
    """
    config_json = read_object(files / CONFIG)
    tokenizer_files.check_token_ids(files, config)
    _read_settings(files, files_kind, config)  # so that a file which cannot be read is not copied either
    if files_kind == layout:
        copied, changed = _read_files(files, SIDECAR_FILES), _with_dtype(config_json, dtype)
        if not config.text.tie_word_embeddings:
            changed = _untied(changed)
        if config_json and changed != config_json:
            copied[CONFIG] = tokenizer_files.dump(changed)
        return copied
    out = _read_files(files, [name for name, shared in SIDECAR_FILES.items() if shared])
    contents = {name: dict(constants) for name, constants in _CONSTANTS[layout].items()}
    _fill_processors(contents, files, files_kind, config, layout)
    if layout == "native":
        contents[CONFIG] |= _native_config(files, config_json, config, dtype)
        out["chat_template.jinja"] = tokenizer_files.NATIVE_TEMPLATE.encode()
        out |= tokenizer_files.end_token_files(files)
    else:
        ids, changed = tokenizer_files.add_tokens(files, tokenizer_files.OFFICIAL_TOKENS)
        if changed and (last := max(ids.values())) >= config.text.vocab_size:
            raise InputError(
                f"{files}: the special tokens of the official layout get ids up to {last}, and the embedding table has "
                f"{config.text.vocab_size} rows; enlarge it: `resize_token_embeddings` of transformers"
            )
        out |= changed
        out["chat_template.json"] = tokenizer_files.dump({"chat_template": tokenizer_files.OFFICIAL_TEMPLATE})
        if files_kind == "official-train":
            contents[CONFIG] = _released_config(config_json, ids, config, dtype)
            out |= _read_files(files, ["chat_template.json"])
        else:
            contents[CONFIG] |= {
                "torch_dtype": dtype,
                **_text_keys(config_json, config),
                "image_token_index": _official_id(config_json, ids, config),
                "vision_encoder_config": _tower_section(config),
            }
    return out | {name: tokenizer_files.dump(content) for name, content in contents.items()}


def export_sam2_files(files: pathlib.Path, config: Sam2Config, dtype: str) -> dict[str, bytes]:
    """Returns the sidecar files of an exported SAM-2, in both layouts those of transformers.

    Args:
      files: Folder with the sidecar files of the source.
      config: Configuration of the model.
      dtype: Name of the dtype of the weights.
    """
    size = {"height": config.image_size, "width": config.image_size}
    pixels = {"image_processor_type": "Sam2ImageProcessor", "processor_class": "Sam2Processor", "size": size}
    pixels |= {"image_mean": list(config.image_mean), "image_std": list(config.image_std)}
    pixels["resample"] = {"bilinear": 2, "bicubic": 3}[config.resample]  # the numbers of Pillow
    out = {IMAGE: tokenizer_files.dump(pixels), **_read_files(files, SIDECAR_FILES)}
    base = read_object(files / CONFIG)
    if not base or parse_sam2_config(base) != config or base.get("dtype") != dtype:
        content = sam2_config_json(config, base, dtype)
        out[CONFIG] = tokenizer_files.dump(content)
        stated = parse_sam2_config(JsonObject(content, CONFIG))
        stated = dataclasses.replace(stated, image_mean=config.image_mean, image_std=config.image_std)
        if lost := config_differences(config, stated):
            text = "warning: the export runs as stock SAM-2, because transformers has no other setting: %s"
            logger.warning(text, "; ".join(f"{line} there" for line in lost))
    return out


def with_sam2_section(content: bytes, sam2: Sam2Config) -> bytes:
    """Returns the config.json of a language model with the section that makes it that of a Sa2VA."""
    return tokenizer_files.dump({**json.loads(content), SAM2_SECTION: dataclasses.asdict(sam2)})


def _read_files(files: pathlib.Path, names: Iterable[str]) -> dict[str, bytes]:
    return {name: (files / name).read_bytes() for name in names if (files / name).is_file()}


def _read_settings(files: pathlib.Path, files_kind: str, config: ModelConfig) -> dict[str, Any]:
    """Returns the values of `SETTINGS` in the files of any layout, with limits in tokens."""
    contents = {file: read_object(files / file) for file in (CONFIG, VIDEO, PROCESSOR)}
    contents[IMAGE] = image_processor(files)
    contents[VIDEO] = contents[VIDEO] or contents[PROCESSOR].section("video_processor")
    native, settings = files_kind == "native", {}
    for name, default, official_place, native_place in SETTINGS:
        file, key = native_place if native else official_place
        value = _typed(contents[file], key, default)
        if native and name in ("min_tokens", "max_tokens"):
            edge = {"min_tokens": "shortest_edge", "max_tokens": "longest_edge"}[name]
            pixels = value or _typed(contents[file].section("size"), edge, default)
            side = config.vision.patch_size * settings["image_merge"]
            value = pixels // side**2 if pixels else None
        settings[name] = value if value or value is False else default
    return settings


def _typed(section: JsonObject, key: str, default: bool | int | float) -> Any:
    """Returns a value, None if it is missing; raises InputError if it is not of the type of its default."""
    if isinstance(default, bool):
        return section.flag(key, None)
    if isinstance(default, int):
        return section.integer(key)
    section.number(key, low=0)
    return section.get(key)  # as it is written, so that 1 stays 1


def _fill_processors(
    contents: dict[str, dict[str, Any]], files: pathlib.Path, files_kind: str, config: ModelConfig, layout: str
) -> None:
    """Adds the settings of the source to the processor files of the export."""
    settings, image = _read_settings(files, files_kind, config), image_processor(files)
    for name, _, official_place, native_place in SETTINGS:
        file, key = native_place if layout == "native" else official_place
        contents[file][key] = settings[name]
    pixels = {key: _typed(image, key, default) if key in image else default for key, default in _PIXEL_SETTINGS.items()}
    pixels |= {"image_mean": list(config.vision.image_mean), "image_std": list(config.vision.image_std)}
    for file in {IMAGE, VIDEO} & set(contents):
        contents[file] |= pixels | {"patch_size": config.vision.patch_size}
        if layout == "native":
            area = (config.vision.patch_size * contents[file]["merge_size"]) ** 2
            low, high = settings["min_tokens"] * area, settings["max_tokens"] * area
            size = {"shortest_edge": low, "longest_edge": high}
            contents[file] |= {"min_pixels": low, "max_pixels": high, "size": size}
    if layout == "native":
        contents[VIDEO]["fps"] = None  # the frames come sampled


def _with_dtype(config_json: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns a config.json that states the dtype, under the key that it uses already."""
    return {**config_json, "dtype" if "dtype" in config_json else "torch_dtype": dtype}


def _untied(config_json: dict[str, Any]) -> dict[str, Any]:
    """Returns a config.json that ties the embeddings nowhere, for weights with a head of their own."""
    text = config_json.get("text_config")
    changed = {"text_config": _untied(text)} if isinstance(text, dict) else {}
    return config_json | changed | ({"tie_word_embeddings": False} if config_json.get("tie_word_embeddings") else {})


def _text_keys(config_json: JsonObject, config: ModelConfig) -> dict[str, Any]:
    text = config_json.section("text_config") or config_json
    for key in ("attention_dropout", "initializer_range"):
        text.number(key, low=0)
    return {key: text[key] for key in _SHARED_TEXT_KEYS if key in text} | text_section(config)


def _tower_section(config: ModelConfig) -> dict[str, Any]:
    return {"model_type": "videollama3_vision_encoder", **vision_section(config)}


def _native_config(files, config_json: JsonObject, config: ModelConfig, dtype: str) -> dict[str, Any]:
    ids = tokenizer_files.added_tokens(files)
    image = ids.get(tokenizer_files.NATIVE_IMAGE, _NATIVE_IMAGE_ID)
    video = ids.get(tokenizer_files.NATIVE_VIDEO, _NATIVE_VIDEO_ID)
    if max(image, video) >= config.text.vocab_size:
        image = min(config_json.integer("image_token_index", _OFFICIAL_IMAGE_ID, low=1), config.text.vocab_size - 1)
        video = image - 1
    return {
        "dtype": dtype,
        "image_token_id": image,
        "video_token_id": video,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "text_config": {"model_type": "qwen2", **_text_keys(config_json, config)},
        "vision_config": {"model_type": "video_llama_3_vision", **vision_section(config)},
    }


def _released_config(config_json: JsonObject, ids, config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Converts a trainer's config.json to that of a released model."""
    released = {key: value for key, value in config_json.items() if key not in _TRAINER_KEYS}
    released |= {
        "vision_encoder": None,
        "vision_encoder_config": _tower_section(config),
        "tie_word_embeddings": config.text.tie_word_embeddings,
    }
    released.setdefault("image_token_index", _official_id(config_json, ids, config))
    return _with_dtype(released, dtype)


def _official_id(config_json: JsonObject, ids: Mapping[str, int], config: ModelConfig) -> int:
    """Returns the id of `<image>` in the tokenizer; without one, that of released models if the vocabulary has it."""
    known = config.text.vocab_size > _OFFICIAL_IMAGE_ID
    released = _OFFICIAL_IMAGE_ID if known else config_json.integer("image_token_id", _OFFICIAL_IMAGE_ID)
    return ids.get(tokenizer_files.OFFICIAL_IMAGE, released)
