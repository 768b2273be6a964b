"""Converts Hugging Face `config.json` to and from `ModelConfig`, for every layout of the name map."""

import dataclasses
import logging
import os
import pathlib
import re
from collections.abc import Container, Mapping
from typing import Any

from vl3_jax.checkpoint.names import LAYOUTS
from vl3_jax.checkpoint.tensors import TensorFiles
from vl3_jax.errors import InputError
from vl3_jax.json_file import JsonObject, read_object
from vl3_jax.model.config import ModelConfig, TextConfig, VisionConfig, largest

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

_TAKE = "take the config.json that belongs to the weights"
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


def _model_type(config: JsonObject) -> ModelType:
    if (name := config.choice("model_type", MODEL_TYPES)) is None:
        raise InputError(f"{config.path}: model_type is missing; {_TAKE}")
    return MODEL_TYPES[name]


def detect_layout(config: JsonObject, names: Container[str]) -> str:
    """Returns the layout of a checkpoint: by `model_type` and, where several layouts share it, by the tensor names."""
    candidates = _model_type(config).layouts
    found = [name for name in candidates if LAYOUTS[name].get("vision", "") + _PATCH_EMBEDDING in names]
    return (found or candidates)[0]


def parse_config(config: JsonObject, vision_shapes: VisionConfig | None = None) -> ModelConfig:
    """Returns the model configuration that a `config.json` describes.

    Args:
      config: Content of the file, with any `model_type` of `MODEL_TYPES`. For a tower or a decoder alone, the other
        half of the result keeps its defaults and must not be used.
      vision_shapes: Tower configuration inferred from the weights, for files of the official trainer, which do
        not store it.

    Raises:
      InputError: A value is missing, of another type, out of its range or unsupported.
    """
    kind, parts = _model_type(config), {}
    _refuse_quantised(config)
    _require(config, "mm_projector_type", "mlp2x_gelu")
    try:
        if kind.text is not None:
            text = _section(config, kind.text)
            tied = config.flag("tie_word_embeddings") or text.flag("tie_word_embeddings")
            parts["text"] = _text(text, tied)
        if kind.vision and config.get(kind.vision) is None and vision_shapes is not None:
            parts["vision"] = vision_shapes
        elif kind.vision is not None:
            parts["vision"] = _vision(_section(config, kind.vision), kind.vision_defaults)
        return ModelConfig(**parts)
    except ValueError as error:
        raise InputError(f"{config.path}: {error}; check the sizes in the file") from None


def infer_tower(layout: str, config: JsonObject, tensors: TensorFiles) -> VisionConfig | None:
    """Infers the tower configuration for files of the official trainer, which name the tower's folder, not its sizes.

    Returns:
      None where `config` describes the tower itself or its weights are missing.
    """
    if config.get("vision_encoder_config") is not None or config["model_type"] != "videollama3_qwen2":
        return None
    tower = config.text("vision_encoder")
    if tower and os.path.isfile(config_path := pathlib.Path(tower, "config.json")):
        return parse_config(read_object(config_path)).vision
    prefix = LAYOUTS[layout]["vision"]
    patch_embed = tensors.infos.get(prefix + _PATCH_EMBEDDING)
    fc1 = tensors.infos.get(f"{prefix}encoder.layers.0.mlp.fc1.weight")
    if patch_embed is None or fc1 is None or len(patch_embed.shape) != 4 or len(fc1.shape) != 2:
        return None
    pattern = re.escape(prefix) + r"encoder\.layers\.(\d+)\."
    num_layers = len({match[1] for name in tensors if (match := re.match(pattern, name))})
    hidden_size, num_channels, patch_size, _ = patch_embed.shape
    if hidden_size != VisionConfig.hidden_size:
        logger.warning(
            "warning: %s: the tower's number of heads is not stored in the checkpoint; assuming %d",
            fc1.file,
            VisionConfig.num_heads,
        )
    sizes = {"hidden_size": hidden_size, "intermediate_size": fc1.shape[0], "num_layers": num_layers}
    try:
        return VisionConfig(**sizes, patch_size=patch_size, num_channels=num_channels)
    except ValueError as error:
        raise InputError(f"{fc1.file}: {error}; name the tower's folder as vision_encoder in config.json") from None


def image_processor(files: pathlib.Path) -> JsonObject:
    """Reads the image processor settings from their own file or, as newer versions save them, processor_config.json."""
    return read_object(files / "preprocessor_config.json") or read_object(files / "processor_config.json").section(
        "image_processor"
    )


def pixel_statistics(files: pathlib.Path) -> dict[str, tuple[float, ...]]:
    """Returns `image_mean` and `image_std` of the processor files, as far as they are present."""
    image = image_processor(files)
    found = {"image_mean": image.numbers("image_mean", 3), "image_std": image.numbers("image_std", 3, low=1e-6)}
    return {key: values for key, values in found.items() if values is not None}


def _section(config: JsonObject, key: str) -> JsonObject:
    if key and config.get(key) is None:
        raise InputError(f"{config.path}: {key} is missing; {_TAKE}")
    return config.section(key) if key else config


def _require(config: JsonObject, key: str, value: str) -> None:
    if config.get(key) not in (None, value):
        raise config.error(key, f"only {value!r} is supported")


def _refuse_quantised(config: JsonObject) -> None:
    if config.get("quantization_config") is not None:
        method = config.section("quantization_config").text("quant_method", "an unnamed method")
        raise InputError(
            f"{config.path}: the weights are quantised ({method}), and vl3 reads bfloat16, float16 and float32; take "
            "the original checkpoint, or save `model.dequantize()` of transformers"
        )


def _pick(config: JsonObject, keys: Mapping[str, str], kind: type, defaults: Mapping[str, Any], optional=()) -> dict:
    """Returns the fields of the dataclass `kind` that `config` or `defaults` has, by the type of each field."""
    types, picked = {field.name: field.type for field in dataclasses.fields(kind)}, {}
    for key, field in keys.items():
        if types[field] is int:
            picked[field] = config.integer(key, defaults.get(key), low=1, high=largest(field))
        elif types[field] is float:
            picked[field] = config.number(key, defaults.get(key))
        else:
            picked[field] = config.text(key, defaults.get(key))
    if missing := [key for key, field in keys.items() if picked[field] is None and key not in optional]:
        raise InputError(f"{config.path}: {', '.join(missing)} is missing; {_TAKE}")
    return {field: value for field, value in picked.items() if value is not None}


def _vision(config: JsonObject, defaults: Mapping[str, Any]) -> VisionConfig:
    if isinstance(sides := config.get("patch_size"), list) and len(sides) == 2 and sides[0] == sides[1]:
        config = JsonObject({**config, "patch_size": sides[0]}, config.path, config.place)
    picked = _pick(config, _VISION_KEYS, VisionConfig, defaults, ("num_channels", "hidden_act", "layer_norm_eps"))
    rope = config.section("rope_parameters")
    return VisionConfig(**picked, rope_theta=rope.number("rope_theta", VisionConfig.rope_theta))


def _text(config: JsonObject, tied: bool) -> TextConfig:
    _require(config, "hidden_act", "silu")
    layer_types = config.get("layer_types")
    all_full = isinstance(layer_types, list) and "sliding_attention" not in layer_types
    if config.flag("use_sliding_window") and not all_full:
        raise InputError(f"{config.path}: use_sliding_window true is not supported; no released model uses it")
    picked = _pick(config, _TEXT_KEYS, TextConfig, _TRANSFORMERS_TEXT, optional=("num_key_value_heads",))
    picked.setdefault("num_kv_heads", picked["num_heads"])
    head_dim = config.integer("head_dim", 0, high=largest("head_dim")) or picked["hidden_size"] // picked["num_heads"]
    return TextConfig(**picked, head_dim=head_dim, rope_theta=_rope_theta(config), tie_word_embeddings=tied)


def _rope_theta(config: JsonObject) -> float:
    """Reads `rope_theta` from either spelling: `rope_parameters`, or `rope_theta` with `rope_scaling`."""
    parameters, scaling = config.section("rope_parameters"), config.section("rope_scaling")
    rope_type = parameters.text("rope_type") or scaling.text("rope_type") or scaling.text("type") or "default"
    if rope_type != "default":
        raise InputError(f"{config.path}: rope type {rope_type!r} is not supported; only plain rotary positions are")
    return parameters.number("rope_theta") or config.number("rope_theta") or _DEFAULT_ROPE_THETA


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


def from_dict(values: JsonObject) -> ModelConfig:
    """Inverts `dataclasses.asdict`: unknown keys raise InputError, missing ones take the current defaults."""
    try:
        vision = {key: tuple(value) if isinstance(value, list) else value for key, value in values["vision"].items()}
        parts = {"vision": VisionConfig(**vision), "text": TextConfig(**values["text"])}
        return ModelConfig(**{**values, **parts})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{values.path}: model configuration is damaged ({error}); convert the checkpoint again"
        ) from None
