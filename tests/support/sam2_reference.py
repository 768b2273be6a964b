"""The reference of SAM-2: transformers' `sam2_video` on torch, with weights that reveal errors.

Default initialisation hides errors: position embeddings, memory tokens and the fuser's scales are 0, and attention is
nearly uniform. Here every parameter is away from its neutral value.
"""

import dataclasses

import numpy as np
import torch
from flax.traverse_util import unflatten_dict

from support.reference import declare_operators
from vl3_jax.checkpoint.names import name_map
from vl3_jax.sam2.sam2_config import HieraConfig, Sam2Config, sam2_preset

declare_operators()
from transformers import (  # noqa: E402
    Sam2Config as ReferenceImageConfig,
)
from transformers import (  # noqa: E402
    Sam2Model,
    Sam2Processor,
    Sam2VideoConfig,
    Sam2VideoInferenceSession,
    Sam2VideoModel,
)
from transformers.models.sam2.configuration_sam2 import (  # noqa: E402
    Sam2HieraDetConfig,
    Sam2VisionConfig,
)
from transformers.models.sam2.image_processing_sam2 import Sam2ImageProcessor  # noqa: E402
from transformers.models.sam2_video.configuration_sam2_video import (  # noqa: E402
    Sam2VideoMaskDecoderConfig,
    Sam2VideoPromptEncoderConfig,
)
from transformers.models.sam2_video.processing_sam2_video import Sam2VideoProcessor  # noqa: E402
from transformers.models.sam2_video.video_processing_sam2_video import Sam2VideoVideoProcessor  # noqa: E402

__all__ = [
    "PRESENT",
    "Sam2ImageProcessor",
    "Sam2Processor",
    "Sam2VideoInferenceSession",
    "Sam2VideoProcessor",
    "Sam2VideoVideoProcessor",
    "channels_last",
    "image_reference",
    "layout_of_size",
    "sam2_params",
    "sam2_reference",
    "sam2_tensors",
    "tiny_sam2",
]

PRESENT = 10.0  # is added to the presence logit, so that objects are there
_TABLES = ("_embed.weight", "_token.weight", "_tokens.weight")
# Relative to 1 / sqrt(fan in), for sharp attention.
_GAINS = {"q_proj": 1.5, "k_proj": 1.5, "attn.qkv": 1.5}


def tiny_sam2(version: str = "2.1", **changes) -> Sam2Config:
    """Returns a configuration of a few channels, whose windows of 6 and 3 do not tile their maps."""
    hiera = HieraConfig((16, 32, 64, 128), (1, 2, 4, 8), (1, 2, 3, 1), (8, 4, 6, 3), (4,))
    return _small(Sam2Config(hiera, image_size=128, **_version(version)), **changes)


def layout_of_size(size: str) -> Sam2Config:
    """Returns a configuration with the blocks, windows and heads of a released size, of few channels."""
    released = sam2_preset(size).hiera
    widths = tuple(8 * heads for heads in released.heads)
    depths = tuple(min(depth, 3) for depth in released.depths)
    hiera = dataclasses.replace(released, widths=widths, depths=depths, global_blocks=(depths[0] + depths[1] + 1,))
    return _small(Sam2Config(hiera, image_size=256))


def _version(version: str) -> dict[str, bool]:
    return {"pointer_time": version == "2.1", "occlusion": version == "2.1"}


def _small(config: Sam2Config, **changes) -> Sam2Config:
    small = {
        "width": 128,
        "decoder_heads": 4,
        "decoder_mlp": 64,
        "iou_width": 32,
        "memory_layers": 2,
        "memory_mlp": 64,
        "fuser_mlp": 96,
    }
    return dataclasses.replace(config, **{**small, **changes})


def sam2_reference_config(config: Sam2Config) -> Sam2VideoConfig:
    """Converts a configuration to a `Sam2VideoConfig`."""
    hiera, width, grid = config.hiera, config.width, config.grid
    backbone = Sam2HieraDetConfig(
        hidden_size=hiera.widths[0],
        num_attention_heads=hiera.heads[0],
        image_size=[config.image_size] * 2,
        blocks_per_stage=list(hiera.depths),
        embed_dim_per_stage=list(hiera.widths),
        num_attention_heads_per_stage=list(hiera.heads),
        window_size_per_stage=list(hiera.windows),
        global_attention_blocks=list(hiera.global_blocks),
        window_positional_embedding_background_size=list(hiera.position_size),
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=list(hiera.widths[::-1]),
        backbone_feature_sizes=[[4 * grid] * 2, [2 * grid] * 2, [grid] * 2],
        fpn_hidden_size=width,
    )
    return Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config=Sam2VideoPromptEncoderConfig(hidden_size=width, image_size=config.image_size),
        mask_decoder_config=Sam2VideoMaskDecoderConfig(
            hidden_size=width,
            mlp_dim=config.decoder_mlp,
            num_attention_heads=config.decoder_heads,
            iou_head_hidden_dim=config.iou_width,
        ),
        image_size=config.image_size,
        memory_attention_hidden_size=width,
        memory_attention_num_layers=config.memory_layers,
        memory_attention_feed_forward_hidden_size=config.memory_mlp,
        memory_attention_rope_feat_sizes=[grid, grid],
        memory_encoder_hidden_size=width,
        memory_encoder_output_channels=config.memory_width,
        mask_downsampler_embed_dim=width,
        memory_fuser_embed_dim=width,
        memory_fuser_intermediate_dim=config.fuser_mlp,
        enable_temporal_pos_encoding_for_object_pointers=config.pointer_time,
        enable_occlusion_spatial_embedding=config.occlusion,
    )


def sam2_reference(config: Sam2Config, seed: int = 0, presence: float = PRESENT, time_gain: float = 1.0):
    """Creates a model in evaluation mode in which every part of the computation affects the result.

    Args:
      config: Configuration.
      seed: Seed of the weights.
      presence: What is added to the logit of an object being there.
      time_gain: Factor of the projection of a pointer's distance in time; with 1 long videos are chaotic.
    """
    torch.manual_seed(seed)
    model = Sam2VideoModel(sam2_reference_config(config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5) if name.endswith("weight") else parameter.normal_(0.0, 0.3)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif not name.endswith("weight") or name.endswith(_TABLES):
                parameter.normal_(0.0, 0.5)
            else:
                gain = next((gain for part, gain in _GAINS.items() if part in name), 1.0)
                parameter.normal_(0.0, gain * parameter[0].numel() ** -0.5)
        shared = model.shared_image_embedding.positional_embedding
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(shared)
        model.mask_decoder.pred_obj_score_head.proj_out.bias.add_(presence)
        if config.pointer_time:
            model.temporal_positional_encoding_projection_layer.weight.mul_(time_gain)
    return model


def image_reference(model: Sam2VideoModel) -> Sam2Model:
    """Returns the image predictor that has the weights of a video model."""
    config = model.config
    settings = {
        name: ReferenceImageConfig.sub_configs[name](**getattr(config, name).to_dict())
        for name in ("prompt_encoder_config", "mask_decoder_config")
    }
    predictor = Sam2Model(ReferenceImageConfig(vision_config=config.vision_config, **settings)).eval()
    missing, _ = predictor.load_state_dict(model.state_dict(), strict=False)
    assert not missing, missing
    return predictor


def sam2_tensors(model) -> dict[str, np.ndarray]:
    """Returns the state dict as `save_pretrained` writes it."""
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def sam2_params(tensors: dict[str, np.ndarray], config: Sam2Config, layout: str = "sam2") -> dict:
    """Converts a state dict to our parameter tree; uses every tensor and fills every leaf."""
    names = name_map(layout, config)
    assert set(tensors) == set(names.tensors), set(tensors) ^ set(names.tensors)
    leaves = {}
    for path, leaf in names.leaves.items():
        slices = [spec.to_leaf(tensors[spec.name]) for spec in leaf.tensors]
        leaves[path] = np.stack(slices) if leaf.stacked else np.ascontiguousarray(slices[0])
    return unflatten_dict(leaves, sep="/")


def channels_last(tensor: torch.Tensor) -> np.ndarray:
    """Converts maps [B, C, H, W] to arrays [B, H, W, C]."""
    return tensor.detach().permute(0, 2, 3, 1).numpy()
