"""Converts Hugging Face `config.json` to and from `ModelConfig`, for every layout of the name map."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.model.config import ModelConfig, TextConfig, VisionConfig

# model_type of config.json -> the layouts whose weights go with it.
MODEL_TYPES: dict[str, tuple[str, ...]] = {
    "videollama3_qwen2": ("official", "official-train"),
    "video_llama_3": ("native",),
    "qwen2": ("qwen2",),
    "siglip": ("siglip", "siglip-bare"),
    "siglip_vision_model": ("siglip", "siglip-bare"),
    "videollama3_vision_encoder": ("navit",),
}

_VISION_KEYS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "patch_size": "patch_size",
    "num_channels": "num_channels",
    "hidden_act": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
}
_TEXT_KEYS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
}
# Defaults of transformers for missing keys; VideoLlama3VisionConfig and SiglipVisionConfig agree. The official code
# has the same class defaults, but its files never rely on them, so a missing key is an error there.
_TRANSFORMERS_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
}
_TRANSFORMERS_TEXT = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32_768}
_DEFAULT_ROPE_THETA = 10_000.0  # of transformers' Qwen2Config, where neither spelling is present


def read_json(path: pathlib.Path) -> Any:
    """Reads a JSON file.

    Raises:
      InputError: The file cannot be read or is not valid JSON; the message names the line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"{path}: cannot be read ({reason}); check the folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = getattr(error, "lineno", 1)
        raise InputError(f"{path}:{line}: not valid JSON ({error}); download the file again") from None


def model_type_of(config: Mapping[str, Any], path: pathlib.Path | str) -> str:
    """Returns the `model_type` of a parsed `config.json`; raises InputError if it is not in `MODEL_TYPES`."""
    model_type = config.get("model_type") if isinstance(config, Mapping) else None
    if model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise InputError(f"{path}: model_type {model_type!r} is not one that vl3 reads; expected one of {known}")
    return model_type


def parse_config(
    config: Mapping[str, Any],
    path: pathlib.Path | str,
    vision_shapes: VisionConfig | None = None,
) -> ModelConfig:
    """Returns the model configuration that a `config.json` describes.

    Args:
      config: Parsed file with any `model_type` of `MODEL_TYPES`. For a tower or a decoder alone, the other half
        of the result keeps its defaults and must not be used.
      path: Path of the file, for error messages.
      vision_shapes: Tower configuration inferred from the weights, for files of the official trainer, which do
        not store it.

    Raises:
      InputError: A value is missing or unsupported.
    """
    model_type = model_type_of(config, path)
    try:
        if model_type == "videollama3_qwen2":
            _require(config, "mm_projector_type", ("mlp2x_gelu",), path, default="mlp2x_gelu")
            tower = config.get("vision_encoder_config")
            if tower is None and vision_shapes is not None:
                return ModelConfig(vision_shapes, _text(config, path))
            if tower is None:
                raise InputError(f"{path}: no vision_encoder_config, so the sizes of the tower are unknown; add it")
            return ModelConfig(_vision(tower, path, {}), _text(config, path))
        if model_type == "video_llama_3":
            text, vision = _section(config, "text_config", path), _section(config, "vision_config", path)
            tied = bool(config.get("tie_word_embeddings")) or bool(text.get("tie_word_embeddings"))
            return ModelConfig(
                _vision(vision, path, _TRANSFORMERS_VISION),
                _text({**text, "tie_word_embeddings": tied}, path),
            )
        if model_type == "qwen2":
            return ModelConfig(text=_text(config, path))
        if model_type == "siglip":
            return ModelConfig(vision=_vision(_section(config, "vision_config", path), path, _TRANSFORMERS_VISION))
        if model_type == "siglip_vision_model":
            return ModelConfig(vision=_vision(config, path, _TRANSFORMERS_VISION))
        return ModelConfig(vision=_vision(config, path, {}))
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}; check the sizes in the file") from None


def _section(config: Mapping[str, Any], key: str, path: pathlib.Path | str) -> Mapping[str, Any]:
    section = config.get(key)
    if not isinstance(section, Mapping):
        raise InputError(f"{path}: {key} is missing; take the config.json that belongs to the weights")
    return section


def _require(config: Mapping[str, Any], key: str, allowed: tuple, path: pathlib.Path | str, default: Any) -> None:
    value = config.get(key, default)
    if value not in allowed:
        raise InputError(f"{path}: {key} {value!r} is not supported; vl3 has {' or '.join(map(repr, allowed))}")


def _pick(config: Mapping[str, Any], keys: Mapping[str, str], defaults: Mapping[str, Any], path, optional=()) -> dict:
    picked = {}
    for key, field in keys.items():
        value = config.get(key, defaults.get(key))
        if value is None and key in optional:
            continue
        if value is None:
            raise InputError(f"{path}: {key} is missing; take the config.json that belongs to the weights")
        picked[field] = value
    return picked


def _vision(config: Mapping[str, Any], path: pathlib.Path | str, defaults: Mapping[str, Any]) -> VisionConfig:
    if not isinstance(config, Mapping):
        raise InputError(f"{path}: vision_encoder_config is not an object; take the file that belongs to the weights")
    picked = _pick(config, _VISION_KEYS, defaults, path, optional=("num_channels", "hidden_act", "layer_norm_eps"))
    if isinstance(picked["patch_size"], list | tuple):
        picked["patch_size"] = picked["patch_size"][0]
    rope = config.get("rope_parameters") or {}
    return VisionConfig(**picked, rope_theta=float(rope.get("rope_theta", VisionConfig.rope_theta)))


def _text(config: Mapping[str, Any], path: pathlib.Path | str) -> TextConfig:
    _require(config, "hidden_act", ("silu",), path, default="silu")
    if config.get("use_sliding_window") and "sliding_attention" in config.get("layer_types", ["sliding_attention"]):
        raise InputError(f"{path}: use_sliding_window true is not supported; no released model uses it")
    picked = _pick(config, _TEXT_KEYS, _TRANSFORMERS_TEXT, path, optional=("num_key_value_heads",))
    picked.setdefault("num_kv_heads", picked["num_heads"])
    head_dim = config.get("head_dim") or picked["hidden_size"] // picked["num_heads"]
    return TextConfig(
        **picked,
        head_dim=head_dim,
        rope_theta=_rope_theta(config, path),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
    )


def _rope_theta(config: Mapping[str, Any], path: pathlib.Path | str) -> float:
    """Reads `rope_theta` from either spelling: `rope_parameters`, or `rope_theta` with `rope_scaling`."""
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    rope_type = parameters.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    if rope_type != "default":
        raise InputError(f"{path}: rope type {rope_type!r} is not supported; only plain rotary positions are")
    return float(parameters.get("rope_theta") or config.get("rope_theta") or _DEFAULT_ROPE_THETA)


def text_section(config: ModelConfig) -> dict[str, Any]:
    """Returns the decoder's sizes under Hugging Face keys, `rope_theta` in the older spelling that all readers know."""
    text = config.text
    section = {key: getattr(text, field) for key, field in _TEXT_KEYS.items()}
    section |= {"rope_theta": text.rope_theta, "tie_word_embeddings": text.tie_word_embeddings, "hidden_act": "silu"}
    if text.head_dim * text.num_heads != text.hidden_size:
        section["head_dim"] = text.head_dim
    return section


def vision_section(config: ModelConfig) -> dict[str, Any]:
    """Returns the tower's sizes under Hugging Face keys."""
    return {key: getattr(config.vision, field) for key, field in _VISION_KEYS.items()}


def to_dict(config: ModelConfig) -> dict[str, Any]:
    """Converts a `ModelConfig` to JSON-serialisable values, as stored in `vl3.json` of an Orbax folder."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any], path: pathlib.Path | str) -> ModelConfig:
    """Inverts `to_dict`: unknown keys raise InputError, missing ones take the current defaults."""
    try:
        vision = {key: tuple(value) if isinstance(value, list) else value for key, value in values["vision"].items()}
        rest = {key: value for key, value in values.items() if key not in ("vision", "text")}
        return ModelConfig(VisionConfig(**vision), TextConfig(**values["text"]), **rest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: model configuration is damaged ({error}); convert the checkpoint again") from None
