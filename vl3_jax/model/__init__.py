"""The model as pure Flax modules and functions, independent of files and tokenizers.

Names are imported on first use, so that reading a configuration does not import jax.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vl3_jax.model.cache import KVCache
    from vl3_jax.model.config import PRESETS, ModelConfig, TextConfig, VisionConfig, preset
    from vl3_jax.model.vl3 import VideoLLaMA3, abstract_params, decode, encode, init_params, param_axes, unembed

_MODULES = {
    "cache": ["KVCache"],
    "config": ["PRESETS", "ModelConfig", "TextConfig", "VisionConfig", "preset"],
    "vl3": ["VideoLLaMA3", "abstract_params", "decode", "encode", "init_params", "param_axes", "unembed"],
}

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


def __getattr__(name: str):
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"vl3_jax.model.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
