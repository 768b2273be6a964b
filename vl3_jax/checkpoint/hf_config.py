"""Converts Hugging Face `config.json` to and from `ModelConfig`, for every layout of the name map."""

import dataclasses
import logging
import pathlib
import re
from collections.abc import Container, Mapping
from typing import Any

from vl3_jax.checkpoint.names import LAYOUTS
from vl3_jax.checkpoint.tensors import TensorFiles
from vl3_jax.errors import InputError
from vl3_jax.model.config import ModelConfig, TextConfig, VisionConfig
from vl3_jax.storage.paths import read_json

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ModelType:
    """What a `model_type` of config.json says about the rest of the file.

    Attributes:
      layouts: Layouts whose weights go with it.
      text: Key of the decoder's section; "" for the file itself, None without a decoder.
      vision: Key of the tower's section; "" for the file itself, None without a tower.
      vision_defaults: Values of keys that the tower's section may omit.
    """

    layouts: tuple[str, ...]
    text: str | None
    vision: str | None
    vision_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


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

_PATCH_EMBEDDING = "embeddings.patch_embedding.weight"

MODEL_TYPES: dict[str, ModelType] = {
    "videollama3_qwen2": ModelType(("official", "official-train"), "", "vision_encoder_config"),
    "video_llama_3": ModelType(("native",), "text_config", "vision_config", _TRANSFORMERS_VISION),
    "qwen2": ModelType(("qwen2",), "", None),
    "siglip": ModelType(("siglip", "siglip-bare"), None, "vision_config", _TRANSFORMERS_VISION),
    "siglip_vision_model": ModelType(("siglip", "siglip-bare"), None, "", _TRANSFORMERS_VISION),
    "videollama3_vision_encoder": ModelType(("navit",), None, ""),
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


def _model_type(config: Mapping[str, Any], path: pathlib.Path | str) -> ModelType:
    name = config.get("model_type") if isinstance(config, Mapping) else None
    if name not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise InputError(f"{path}: model_type {name!r} is not one that vl3 reads; expected one of {known}")
    return MODEL_TYPES[name]


def detect_layout(config: Mapping[str, Any], path: pathlib.Path | str, names: Container[str]) -> str:
    """Returns the layout of a checkpoint: by `model_type` and, where several layouts share it, by the tensor names."""
    candidates = _model_type(config, path).layouts
    found = [name for name in candidates if LAYOUTS[name].get("vision", "") + _PATCH_EMBEDDING in names]
    return (found or candidates)[0]


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
    kind, parts = _model_type(config, path), {}
    try:
        _require(config, "mm_projector_type", "mlp2x_gelu", path)
        if kind.text is not None:
            text = _section(config, kind.text, path)
            tied = bool(config.get("tie_word_embeddings")) or bool(text.get("tie_word_embeddings"))
            parts["text"] = _text({**text, "tie_word_embeddings": tied}, path)
        if kind.vision and config.get(kind.vision) is None and vision_shapes is not None:
            parts["vision"] = vision_shapes
        elif kind.vision is not None:
            parts["vision"] = _vision(_section(config, kind.vision, path), path, kind.vision_defaults)
        return ModelConfig(**parts)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}; check the sizes in the file") from None


def infer_tower(layout: str, config: Mapping[str, Any], tensors: TensorFiles) -> VisionConfig | None:
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
    patch_embed = tensors.infos.get(prefix + _PATCH_EMBEDDING)
    fc1 = tensors.infos.get(f"{prefix}encoder.layers.0.mlp.fc1.weight")
    if patch_embed is None or fc1 is None or len(patch_embed.shape) != 4 or len(fc1.shape) != 2:
        return None
    pattern = re.escape(prefix) + r"encoder\.layers\.(\d+)\."
    num_layers = 1 + max(int(match[1]) for name in tensors if (match := re.match(pattern, name)))
    hidden_size, num_channels, patch_size, _ = patch_embed.shape
    if hidden_size != VisionConfig.hidden_size:
        logger.warning(
            "warning: %s: the tower's number of heads is not stored in the checkpoint; assuming %d",
            fc1.file,
            VisionConfig.num_heads,
        )
    sizes = {"hidden_size": hidden_size, "intermediate_size": fc1.shape[0], "num_layers": num_layers}
    return VisionConfig(**sizes, patch_size=patch_size, num_channels=num_channels)


def image_processor(files: pathlib.Path) -> dict[str, Any]:
    """Reads the image processor settings from their own file or, as newer versions save them, processor_config.json."""
    return (
        read_object(files / "preprocessor_config.json")
        or read_object(files / "processor_config.json").get("image_processor")
        or {}
    )


def pixel_statistics(files: pathlib.Path) -> dict[str, tuple[float, ...]]:
    """Returns `image_mean` and `image_std` of the processor files, as far as they are present."""
    image = image_processor(files)
    return {
        key: tuple(float(value) for value in image[key])
        for key in ("image_mean", "image_std")
        if isinstance(image.get(key), list) and len(image[key]) == 3
    }


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object; returns {} if there is no such file."""
    content = read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _section(config: Mapping[str, Any], key: str, path: pathlib.Path | str) -> Mapping[str, Any]:
    section = config.get(key) if key else config
    if not isinstance(section, Mapping):
        raise InputError(f"{path}: {key} is missing; take the config.json that belongs to the weights")
    return section


def _require(config: Mapping[str, Any], key: str, value: str, path: pathlib.Path | str) -> None:
    if config.get(key, value) != value:
        raise InputError(f"{path}: {key} {config[key]!r} is not supported; vl3 has {value!r}")


def _pick(config: Mapping[str, Any], keys: Mapping[str, str], defaults: Mapping[str, Any], path, optional=()) -> dict:
    picked = {field: config.get(key, defaults.get(key)) for key, field in keys.items()}
    if missing := [key for key, field in keys.items() if picked[field] is None and key not in optional]:
        raise InputError(f"{path}: {', '.join(missing)} is missing; take the config.json that belongs to the weights")
    return {field: value for field, value in picked.items() if value is not None}


def _vision(config: Mapping[str, Any], path: pathlib.Path | str, defaults: Mapping[str, Any]) -> VisionConfig:
    picked = _pick(config, _VISION_KEYS, defaults, path, optional=("num_channels", "hidden_act", "layer_norm_eps"))
    if isinstance(picked["patch_size"], list | tuple):
        picked["patch_size"] = picked["patch_size"][0]
    rope = config.get("rope_parameters") or {}
    return VisionConfig(**picked, rope_theta=float(rope.get("rope_theta", VisionConfig.rope_theta)))


def _text(config: Mapping[str, Any], path: pathlib.Path | str) -> TextConfig:
    _require(config, "hidden_act", "silu", path)
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


def from_dict(values: Mapping[str, Any], path: pathlib.Path | str) -> ModelConfig:
    """Inverts `dataclasses.asdict`: unknown keys raise InputError, missing ones take the current defaults."""
    try:
        vision = {key: tuple(value) if isinstance(value, list) else value for key, value in values["vision"].items()}
        parts = {"vision": VisionConfig(**vision), "text": TextConfig(**values["text"])}
        return ModelConfig(**{**values, **parts})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: model configuration is damaged ({error}); convert the checkpoint again") from None
