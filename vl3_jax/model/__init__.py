"""The model: pure Flax modules and functions. Nothing here reads a file or knows a tokenizer."""

from vl3_jax.model.cache import KVCache
from vl3_jax.model.config import PRESETS, ModelConfig, TextConfig, VisionConfig, preset
from vl3_jax.model.vl3 import VideoLLaMA3, abstract_params, decode, encode, init_params, param_axes, unembed

__all__ = [
    "PRESETS",
    "KVCache",
    "ModelConfig",
    "TextConfig",
    "VideoLLaMA3",
    "VisionConfig",
    "abstract_params",
    "decode",
    "encode",
    "init_params",
    "param_axes",
    "preset",
    "unembed",
]
