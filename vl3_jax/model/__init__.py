"""The model as pure Flax modules and functions, independent of files and tokenizers.

What needs jax is imported on first use, so that reading a configuration does not import it.
"""

from typing import TYPE_CHECKING

from vl3_jax.model.config import PRESETS, ModelConfig, TextConfig, VisionConfig, preset

if TYPE_CHECKING:
    from vl3_jax.model.cache import KVCache
    from vl3_jax.model.vl3 import (
        VideoLLaMA3,
        abstract_params,
        decode,
        encode,
        init_params,
        num_parameters,
        param_axes,
        unembed,
    )

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
    "num_parameters",
    "param_axes",
    "preset",
    "unembed",
]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vl3_jax.model import vl3

    return getattr(vl3, name)
