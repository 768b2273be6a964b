"""Converts the `config.json` of transformers' SAM-2 to and from `Sam2Config`: tables, used in both directions."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from vl3_jax.checkpoint.sam2_names import SA2VA, SAM2_LAYOUTS, sam2_name_map
from vl3_jax.checkpoint.tensors import TensorFiles
from vl3_jax.errors import InputError
from vl3_jax.json_file import JsonObject, shown
from vl3_jax.sam2.sam2_config import SIZES, HieraConfig, Sam2Config, sam2_preset

SAM2_MODEL_TYPES = ("sam2_video", "sam2")
# A released checkpoint holds what only video needs, too.
_VISION, _BACKBONE = ("vision_config",), ("vision_config", "backbone_config")
_PROMPT, _DECODER = ("prompt_encoder_config",), ("mask_decoder_config",)

# Section, key and field of `HieraConfig`; lists of sizes.
_TRUNK_KEYS: tuple[tuple[str, str], ...] = (
    ("embed_dim_per_stage", "widths"),
    ("num_attention_heads_per_stage", "heads"),
    ("blocks_per_stage", "depths"),
    ("window_size_per_stage", "windows"),
    ("global_attention_blocks", "global_blocks"),
    ("window_positional_embedding_background_size", "position_size"),
)
# Section, key and field of `Sam2Config`; the defaults of both agree.
_KEYS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    ((), "image_size", "image_size"),
    (_VISION, "fpn_hidden_size", "width"),
    ((), "memory_encoder_output_channels", "memory_width"),
    (_DECODER, "num_hidden_layers", "decoder_layers"),
    (_DECODER, "num_attention_heads", "decoder_heads"),
    (_DECODER, "mlp_dim", "decoder_mlp"),
    (_DECODER, "attention_downsample_rate", "decoder_downsample"),
    (_DECODER, "iou_head_hidden_dim", "iou_width"),
    (_DECODER, "iou_head_depth", "iou_layers"),
    (_PROMPT, "mask_input_channels", "prompt_mask_width"),
    ((), "memory_attention_num_layers", "memory_layers"),
    ((), "memory_attention_num_attention_heads", "memory_heads"),
    ((), "memory_attention_feed_forward_hidden_size", "memory_mlp"),
    ((), "memory_fuser_num_layers", "fuser_layers"),
    ((), "memory_fuser_intermediate_dim", "fuser_mlp"),
    ((), "memory_fuser_kernel_size", "fuser_kernel"),
    ((), "num_maskmem", "num_memories"),
    ((), "max_object_pointers_in_encoder", "num_pointers"),
    ((), "enable_temporal_pos_encoding_for_object_pointers", "pointer_time"),
    ((), "enable_occlusion_spatial_embedding", "occlusion"),
    ((), "sigmoid_scale_for_mem_enc", "memory_scale"),
    ((), "sigmoid_bias_for_mem_enc", "memory_bias"),
    ((), "multimask_max_pt_num", "max_points"),
    ((), "multimask_output_in_sam", "multimask"),
    ((), "multimask_output_for_tracking", "multimask_tracking"),
    (_DECODER, "dynamic_multimask_via_stability", "stability_fallback"),
    (_DECODER, "dynamic_multimask_stability_delta", "stability_delta"),
    (_DECODER, "dynamic_multimask_stability_thresh", "stability_threshold"),
)
# What no released model sets otherwise; a list stands for each of several equal sides, too.
_FIXED: tuple[tuple[tuple[str, ...], str, Any], ...] = (
    (_BACKBONE, "patch_kernel_size", [7, 7]),
    (_BACKBONE, "patch_stride", [4, 4]),
    (_BACKBONE, "patch_padding", [3, 3]),
    (_BACKBONE, "query_stride", [2, 2]),
    (_BACKBONE, "num_query_pool_stages", 3),
    (_BACKBONE, "hidden_act", "gelu"),
    (_VISION, "fpn_kernel_size", 1),
    (_VISION, "fpn_stride", 1),
    (_VISION, "fpn_padding", 0),
    (_VISION, "fpn_top_down_levels", [2, 3]),
    (_VISION, "num_feature_levels", 3),
    (_PROMPT, "patch_size", 16),
    (_PROMPT, "num_point_embeddings", 4),
    (_PROMPT, "hidden_act", "gelu"),
    (_DECODER, "hidden_act", "gelu"),
    (_DECODER, "num_multimask_outputs", 3),
    ((), "max_cond_frame_num", -1),
    ((), "multimask_min_pt_num", 0),
    ((), "memory_attention_downsample_rate", 1),
    ((), "memory_attention_feed_forward_hidden_act", "relu"),
    ((), "mask_downsampler_kernel_size", 3),
    ((), "mask_downsampler_stride", 2),
    ((), "mask_downsampler_padding", 1),
    ((), "mask_downsampler_total_stride", 16),
    ((), "mask_downsampler_hidden_act", "gelu"),
    ((), "memory_fuser_hidden_act", "gelu"),
)
# Sizes that must be those of `fpn_hidden_size`, or of the image.
_WIDTHS: tuple[tuple[tuple[str, ...], str], ...] = (
    (_PROMPT, "hidden_size"),
    (_DECODER, "hidden_size"),
    ((), "memory_attention_hidden_size"),
    ((), "memory_encoder_hidden_size"),
    ((), "mask_downsampler_embed_dim"),
    ((), "memory_fuser_embed_dim"),
)


def sam2_layout(config: JsonObject, names: Iterable[str]) -> str | None:
    """Returns the layout of a SAM-2 checkpoint, by `model_type` and tensor names; None for any other model."""
    names = list(names)
    if any(name.startswith(SAM2_LAYOUTS[SA2VA][1]) for name in names):
        return SA2VA
    is_meta = any(name.startswith("image_encoder.trunk.") for name in names)
    if config.get("model_type") in SAM2_MODEL_TYPES or (is_meta and config.get("model_type") is None):
        return "sam2-meta" if is_meta else "sam2"
    return None


def parse_sam2_config(config: JsonObject) -> Sam2Config:
    """Returns the configuration that a `config.json` of transformers describes; missing keys have its defaults.

    Raises:
      InputError: A value is of another type, out of its range, or one that no released model has.
    """
    _check_fixed(config)
    fields, defaults = {}, Sam2Config()
    for path, key, field in _KEYS:
        default = getattr(defaults, field)
        section = _section(config, path)
        if isinstance(default, bool):
            fields[field] = section.flag(key, default)
        elif isinstance(default, int):
            fields[field] = _side(section, key, default)
        else:
            fields[field] = section.number(key, default, low=-1e6, high=1e6)
    rope = config.section("rope_parameters")
    fields["rope_theta"] = rope.number("rope_theta", defaults.rope_theta)
    backbone = _section(config, _BACKBONE)
    lists = {field: backbone.integers(key) for key, field in _TRUNK_KEYS}
    trunk = {field: tuple(values) for field, values in lists.items() if values}
    trunk["mlp_ratio"] = backbone.number("mlp_ratio", HieraConfig.mlp_ratio)
    trunk["layer_norm_eps"] = backbone.number("layer_norm_eps", HieraConfig.layer_norm_eps)
    try:
        parsed = Sam2Config(HieraConfig(**trunk), **fields)
    except (ValueError, TypeError) as error:
        raise InputError(f"{config.path}: {error}; check the sizes in the file") from None
    for path, key in _WIDTHS:
        if (found := _section(config, path).integer(key, parsed.width)) != parsed.width:
            raise InputError(f"{config.path}: {'.'.join((*path, key))} is {found}; expected {parsed.width}, the width")
    return parsed


def infer_sam2_config(tensors: TensorFiles, location: str, layout: str) -> Sam2Config:
    """Returns the released configuration whose tensors have these names and shapes, in a layout of Meta's names.

    Raises:
      InputError: There is none.
    """
    shapes = {name: info.shape for name, info in tensors.infos.items()}
    prefix = SAM2_LAYOUTS[layout][1]
    version = "2.1" if f"{prefix}obj_ptr_tpos_proj.weight" in shapes else "2.0"
    for size in SIZES:
        config = sam2_preset(size, version)
        names = sam2_name_map(layout, config)
        trunk = (name for name in names.tensors if name.startswith(f"{prefix}image_encoder."))
        if all(shapes.get(name) == names.tensors[name].shape for name in trunk):
            return config
    raise InputError(f"{location}: no config.json, and the weights are of none of the released sizes; add the file")


def sam2_config_json(config: Sam2Config, base: JsonObject, dtype: str) -> dict[str, Any]:
    """Returns the `config.json` of transformers.

    Args:
      config: Configuration of the model.
      base: File that the checkpoint has, whose further keys are kept; may be empty.
      dtype: Dtype of the weights.
    """
    out: dict[str, Any] = {**base, "model_type": "sam2_video", "architectures": ["Sam2VideoModel"], "dtype": dtype}
    for path, key, value in _FIXED:
        _open_section(out, path).setdefault(key, value)
    for path, key, field in _KEYS:
        _open_section(out, path)[key] = getattr(config, field)
    for path, key in _WIDTHS:
        _open_section(out, path)[key] = config.width
    hiera, side = config.hiera, config.image_size
    backbone, vision = _open_section(out, _BACKBONE), _open_section(out, _VISION)
    backbone |= {key: list(getattr(hiera, field)) for key, field in _TRUNK_KEYS}
    backbone |= {"hidden_size": hiera.widths[0], "num_attention_heads": hiera.heads[0], "image_size": [side, side]}
    backbone |= {"mlp_ratio": hiera.mlp_ratio, "layer_norm_eps": hiera.layer_norm_eps}
    backbone["model_type"], vision["model_type"] = "sam2_hiera_det_model", "sam2_vision_model"
    vision["backbone_channel_list"] = list(hiera.widths[::-1])
    vision["backbone_feature_sizes"] = [[config.grid * scale] * 2 for scale in (4, 2, 1)]
    _open_section(out, _PROMPT)["image_size"] = side
    out["memory_attention_rope_feat_sizes"] = [config.grid] * 2
    out["rope_parameters"] = {"rope_theta": config.rope_theta, "rope_type": "axial"}
    return out


def sam2_from_dict(values: JsonObject) -> Sam2Config:
    """Inverts `dataclasses.asdict`: unknown keys raise InputError, missing ones take the current defaults."""
    tuples = lambda section: {key: tuple(v) if isinstance(v, list) else v for key, v in section.items()}  # noqa: E731
    try:
        return Sam2Config(**tuples({**values, "hiera": HieraConfig(**tuples(values["hiera"]))}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{values.path}: model configuration is damaged ({error}); convert the checkpoint again"
        ) from None


def config_differences(first: Sam2Config, second: Sam2Config) -> list[str]:
    """Returns a line for each field that differs."""
    sides = [{**dataclasses.asdict(config), **dataclasses.asdict(config)["hiera"]} for config in (first, second)]
    names = [name for name in sides[0] if name != "hiera" and sides[0][name] != sides[1][name]]
    return [f"{name} is {sides[0][name]} and {sides[1][name]}" for name in names]


def export_layout(format_name: str) -> str:
    """Returns the layout of SAM-2 that a format of an export stands for: native transformers, official Meta."""
    return {"native": "sam2", "official": "sam2-meta"}[format_name]


def _check_fixed(config: JsonObject) -> None:
    for path, key, expected in _FIXED:
        section = _section(config, path)
        value = section.get(key)
        equal_sides = isinstance(expected, list) and expected == [value] * len(expected)
        if value is not None and value != expected and not equal_sides:
            raise section.error(key, f"only {shown(expected)} is supported, which all released models have")


def _section(config: JsonObject, path: tuple[str, ...]) -> JsonObject:
    for key in path:
        config = config.section(key)
    return config


def _open_section(out: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for key in path:
        out[key] = dict(out.get(key) or {})
        out = out[key]
    return out


def _side(section: JsonObject, key: str, default: int) -> int:
    """Returns an integer, which may stand for both of two equal sides."""
    values = section.integers(key, low=0)
    if len(set(values)) > 1:
        raise section.error(key, "only square images are supported")
    return values[0] if values else default
