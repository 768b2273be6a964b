"""Copies the small files beside the weights, and converts them where a checkpoint changes its layout."""

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from vl3_jax.checkpoint import templates, tokens
from vl3_jax.checkpoint.hf_config import read_json, text_section, vision_section
from vl3_jax.checkpoint.hub import SIDECAR_FILES
from vl3_jax.model.config import ModelConfig

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
_TOKENIZER_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


def copy_sidecar_files(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copies the sidecar files of the local folder `source` to the folder `target`, byte for byte."""
    target = epath.Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for name in SIDECAR_FILES:
        file = pathlib.Path(source) / name
        if file.is_file():
            (target / name).write_bytes(file.read_bytes())


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
    """
    config_json = _read(files, "config.json")
    if files_kind == layout:
        copied = {name: (files / name).read_bytes() for name in SIDECAR_FILES if (files / name).is_file()}
        if _set_dtype(config_json, dtype):
            copied["config.json"] = tokens.dump(config_json)
        return copied
    out = {name: (files / name).read_bytes() for name in _TOKENIZER_FILES if (files / name).is_file()}
    if layout == "native":
        out["config.json"] = tokens.dump(_native_config(files, files_kind, config_json, config, dtype))
        out |= {name: tokens.dump(content) for name, content in _native_processors(files, config).items()}
        out["chat_template.jinja"] = templates.NATIVE.encode()
        return out | tokens.end_token_files(files)
    ids, changed = tokens.add_official_tokens(files)
    out |= changed
    processors = _official_processors(files, files_kind, config)
    compress = processors.pop("use_token_compression")
    if files_kind == "official-train":
        official = _released_config(config_json, ids, config, dtype)
    else:
        official = _official_config(config_json, ids, config, dtype, compress)
    out["config.json"] = tokens.dump(official)
    out |= {name: tokens.dump(content) for name, content in processors.items()}
    if files_kind == "official-train" and (files / "chat_template.json").is_file():
        out["chat_template.json"] = (files / "chat_template.json").read_bytes()
    else:
        out["chat_template.json"] = tokens.dump({"chat_template": templates.OFFICIAL})
    return out


def pixel_statistics(files: pathlib.Path) -> dict[str, tuple[float, ...]]:
    """Returns `image_mean` and `image_std` of the processor files, as far as they are present."""
    image = _image_processor(files)
    return {
        key: tuple(float(value) for value in image[key])
        for key in ("image_mean", "image_std")
        if isinstance(image.get(key), list) and len(image[key]) == 3
    }


def _read(files: pathlib.Path, name: str) -> dict[str, Any]:
    """Reads a JSON object; returns {} if there is no such file."""
    path = files / name
    content = read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _set_dtype(config: dict[str, Any], dtype: str) -> bool:
    """Sets the dtype under the key that `config` uses; returns False if nothing changes."""
    key = "dtype" if "dtype" in config else "torch_dtype"
    if not config or config.get(key) == dtype:
        return False
    config[key] = dtype
    return True


def _text_keys(config_json: Mapping[str, Any]) -> dict[str, Any]:
    text = config_json.get("text_config") or config_json
    return {key: text[key] for key in _SHARED_TEXT_KEYS if key in text}


def _native_config(files, files_kind: str, config_json, config: ModelConfig, dtype: str) -> dict[str, Any]:
    image, video = _native_ids(files, config_json, config)
    return {
        "architectures": ["VideoLlama3ForConditionalGeneration"],
        "model_type": "video_llama_3",
        "dtype": dtype,
        "image_token_id": image,
        "video_token_id": video,
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "text_config": {"model_type": "qwen2", **_text_keys(config_json), **text_section(config)},
        "vision_config": {"model_type": "video_llama_3_vision", **vision_section(config)},
    }


def _native_ids(files, config_json, config: ModelConfig) -> tuple[int, int]:
    """Returns the ids of the image and video placeholders of the tokenizer, by default those of transformers."""
    ids = tokens.added_tokens(files)
    image, video = ids.get(tokens.NATIVE_IMAGE, 151_655), ids.get(tokens.NATIVE_VIDEO, 151_656)
    if max(image, video) < config.text.vocab_size:
        return image, video
    image = min(config_json.get("image_token_index", 151_665), config.text.vocab_size - 1)
    return image, image - 1


def _released_config(config_json, ids, config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Converts a trainer's config.json to that of a released model."""
    released = {key: value for key, value in config_json.items() if key not in _TRAINER_KEYS}
    released["vision_encoder"] = None
    released["vision_encoder_config"] = _tower_section(config)
    released["tie_word_embeddings"] = config.text.tie_word_embeddings
    released.setdefault("image_token_index", _official_id(config_json, ids, config))
    _set_dtype(released, dtype)
    return released


def _official_config(config_json, ids, config: ModelConfig, dtype: str, compress: bool) -> dict[str, Any]:
    return {
        "architectures": ["Videollama3Qwen2ForCausalLM"],
        "model_type": "videollama3_qwen2",
        "torch_dtype": dtype,
        **_text_keys(config_json),
        **text_section(config),
        "image_token_index": _official_id(config_json, ids, config),
        "mm_projector_type": "mlp2x_gelu",
        "use_token_compression": compress,
        "vision_encoder": None,
        "vision_encoder_config": _tower_section(config),
    }


def _official_id(config_json: Mapping[str, Any], ids: Mapping[str, int], config: ModelConfig) -> int:
    """Returns the id of `<image>` in the tokenizer; without one, that of released models if the vocabulary has it."""
    if tokens.OFFICIAL_IMAGE in ids:
        return ids[tokens.OFFICIAL_IMAGE]
    return 151_665 if config.text.vocab_size > 151_665 else config_json.get("image_token_id", 151_665)


def _tower_section(config: ModelConfig) -> dict[str, Any]:
    return {"model_type": "videollama3_vision_encoder", **vision_section(config)}


def _image_processor(files: pathlib.Path) -> dict[str, Any]:
    """Reads the image processor settings from their own file or, as newer versions save them, processor_config.json."""
    return (
        _read(files, "preprocessor_config.json") or _read(files, "processor_config.json").get("image_processor") or {}
    )


def _video_processor(files: pathlib.Path) -> dict[str, Any]:
    return (
        _read(files, "video_preprocessor_config.json")
        or _read(files, "processor_config.json").get("video_processor")
        or {}
    )


def _pixel_settings(image: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    return {
        "do_convert_rgb": image.get("do_convert_rgb", True),
        "do_normalize": image.get("do_normalize", True),
        "do_rescale": image.get("do_rescale", True),
        "do_resize": image.get("do_resize", True),
        "image_mean": list(config.vision.image_mean),
        "image_std": list(config.vision.image_std),
        "patch_size": config.vision.patch_size,
        "resample": image.get("resample", 3),
        "rescale_factor": image.get("rescale_factor", 1 / 255),
    }


def _native_processors(files: pathlib.Path, config: ModelConfig) -> dict[str, dict[str, Any]]:
    """Returns the native processor files, with the token limits of the official files as pixel limits."""
    image, processor = _image_processor(files), _read(files, "processor_config.json")
    min_tokens, max_tokens = image.get("min_tokens", 16), image.get("max_tokens", 16_384)
    out = {}
    for file, kind, merge in (
        ("preprocessor_config.json", "image", processor.get("image_merge_size", 1)),
        ("video_preprocessor_config.json", "video", processor.get("video_merge_size", 2)),
    ):
        side = config.vision.patch_size * merge
        out[file] = {
            **_pixel_settings(image, config),
            f"{kind}_processor_type": f"VideoLlama3{kind.capitalize()}Processor",
            "processor_class": "VideoLlama3Processor",
            "min_pixels": min_tokens * side**2,
            "max_pixels": max_tokens * side**2,
            "size": {"shortest_edge": min_tokens * side**2, "longest_edge": max_tokens * side**2},
            "merge_size": merge,
            "temporal_patch_size": 1,
        }
    out["video_preprocessor_config.json"] |= {
        "max_frames": processor.get("max_frames", 180),
        "min_frames": 4,
        "fps": None,
        "do_sample_frames": False,
        "use_token_compression": _read(files, "config.json").get("use_token_compression", True),
        "return_metadata": True,
    }
    out["processor_config.json"] = {"processor_class": "VideoLlama3Processor"}
    return out


def _official_processors(files: pathlib.Path, files_kind: str, config: ModelConfig) -> dict[str, Any]:
    """Returns the official processor files and the setting `use_token_compression` for any layout of the source."""
    image, video, processor = _image_processor(files), _video_processor(files), _read(files, "processor_config.json")
    if files_kind == "native":
        image_merge, video_merge = image.get("merge_size", 1), video.get("merge_size", 2)
        side = config.vision.patch_size * image_merge
        min_tokens, max_tokens = (_token_limit(image, bound, side) for bound in ("min", "max"))
    else:
        image_merge, video_merge = processor.get("image_merge_size", 1), processor.get("video_merge_size", 2)
        min_tokens, max_tokens = image.get("min_tokens"), image.get("max_tokens")
    preprocessor = {
        "image_processor_type": "Videollama3ImageProcessor",
        "processor_class": "Videollama3Qwen2Processor",
        **_pixel_settings(image, config),
        "min_tokens": min_tokens or 16,
        "max_tokens": max_tokens or 16_384,
    }
    return {
        "preprocessor_config.json": preprocessor,
        "processor_config.json": {
            "processor_class": "Videollama3Qwen2Processor",
            "image_merge_size": image_merge,
            "video_merge_size": video_merge,
            "fps": (video if files_kind == "native" else processor).get("fps") or 1,
            "max_frames": (video if files_kind == "native" else processor).get("max_frames") or 180,
        },
        "use_token_compression": video.get("use_token_compression", True),
    }


def _token_limit(processor: Mapping[str, Any], bound: str, side: int) -> int | None:
    """Converts the "min" or "max" pixel limit, in either spelling, to tokens of `side` x `side` pixels."""
    size = processor.get("size") or {}
    pixels = processor.get(f"{bound}_pixels") or size.get({"min": "shortest_edge", "max": "longest_edge"}[bound])
    return math.floor(pixels / side**2) if pixels else None
