"""Model configurations: the sizes that determine the parameters' shapes and the forward pass.

Sources: the released `config.json` files (arXiv 2501.13106; DAMO-NLP-SG/VideoLLaMA3-2B and -7B).
"""

import dataclasses
import math
from typing import Any

from vl3_jax.errors import InputError

# The largest sizes, far above those of any model: a damaged file must not cost hours or the memory of the machine.
_MAX_SIZE, _MAX_VOCAB, _MAX_LAYERS, _MAX_POSITIONS = 2**20, 2**24, 1024, 2**31 - 1
_LARGEST = {"num_layers": _MAX_LAYERS, "vocab_size": _MAX_VOCAB, "max_position_embeddings": _MAX_POSITIONS}

HIDDEN_ACTS = ("gelu_pytorch_tanh", "gelu", "silu")  # activations that the layers have


def largest(field: str) -> int:
    """Returns the largest value of an integer field of `VisionConfig` and `TextConfig`; the smallest is 1."""
    return _LARGEST.get(field, _MAX_SIZE)


def _check_fields(config: Any) -> None:
    """Raises ValueError where a field is of another type, an integer out of its range, or a float not positive."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if field.type is int and not (is_number and isinstance(value, int) and 1 <= value <= largest(field.name)):
            raise ValueError(f"{field.name} is {value!r}; expected an integer from 1 to {largest(field.name)}")
        if field.type is float and not (is_number and 1e-30 <= value <= 1e30):
            raise ValueError(f"{field.name} is {value!r}; expected a number from 1e-30 to 1e+30")
        if field.type in (bool, str) and not isinstance(value, field.type):
            raise ValueError(f"{field.name} is {value!r}; expected a {field.type.__name__}")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Configuration of the SigLIP-NaViT tower: any resolution, 2D rotary positions, attention within one frame.

    `image_mean` and `image_std` normalise pixels that are scaled to 0..1. They are part of the model because uint8
    patches are normalised on the device.
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_layers: int = 27
    num_heads: int = 16
    patch_size: int = 14
    num_channels: int = 3
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        _check_fields(self)
        if self.hidden_act not in HIDDEN_ACTS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}; expected one of {', '.join(HIDDEN_ACTS)}")
        for name in ("image_mean", "image_std"):
            values, numbers = getattr(self, name), (float, int)
            if not (len(values) == 3 and all(isinstance(value, numbers) and math.isfinite(value) for value in values)):
                raise ValueError(f"{name} is {values!r}; expected three numbers")
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std is {self.image_std!r}; expected numbers above 0")
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise ValueError(
                f"vision hidden_size {self.hidden_size} over {self.num_heads} heads must give a head size "
                f"divisible by 4 (2D rotary positions split it in four)"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Number of values in one flattened patch: channels x rows x columns (588 for 14 x 14 RGB)."""
        return self.num_channels * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Configuration of the Qwen2.5 decoder: grouped-query attention, SwiGLU, one-dimensional rotary positions."""

    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_layers: int = 28
    num_heads: int = 12
    num_kv_heads: int = 2
    head_dim: int = 128
    vocab_size: int = 151_936
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 32_768

    def __post_init__(self):
        _check_fields(self)
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, and rotary positions turn pairs of channels")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads do not divide over {self.num_kv_heads} key/value heads")

    @property
    def cached_values_per_token(self) -> int:
        """Number of channels in the keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Configuration of a VideoLLaMA3: tower, two-layer projector (`mlp2x_gelu`) and decoder."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    projector_act: str = "gelu"

    def __post_init__(self):
        if self.projector_act not in HIDDEN_ACTS:
            raise ValueError(f"projector_act is {self.projector_act!r}; expected one of {', '.join(HIDDEN_ACTS)}")


_TEXT_7B = TextConfig(
    hidden_size=3584,
    intermediate_size=18_944,
    num_heads=28,
    num_kv_heads=4,
    vocab_size=152_064,
    tie_word_embeddings=False,
)

PRESETS: dict[str, ModelConfig] = {
    "2b": ModelConfig(),
    "7b": ModelConfig(text=_TEXT_7B),
    # Shapes for tests and mock runs: every dimension that a mesh of 8 may split divides by 8.
    "tiny": ModelConfig(
        vision=VisionConfig(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4),
        text=TextConfig(
            hidden_size=64,
            intermediate_size=128,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            vocab_size=512,
        ),
    ),
    # The bundled model, small enough to be trained on a laptop; its vocabulary is that of its tokenizer.
    "nano": ModelConfig(
        vision=VisionConfig(hidden_size=96, intermediate_size=384, num_layers=4, num_heads=4),
        text=TextConfig(
            hidden_size=128,
            intermediate_size=384,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            vocab_size=1024,
        ),
    ),
    "mid": ModelConfig(
        vision=VisionConfig(hidden_size=384, intermediate_size=1024, num_layers=12, num_heads=6),
        text=TextConfig(
            hidden_size=512,
            intermediate_size=1536,
            num_layers=8,
            num_heads=8,
            num_kv_heads=2,
            head_dim=64,
            vocab_size=2048,
            tie_word_embeddings=False,
        ),
    ),
}


def preset(name: str) -> ModelConfig:
    """Returns a named configuration.

    Args:
      name: A key of `PRESETS`.

    Raises:
      InputError: No configuration has this name.
    """
    if name not in PRESETS:
        raise InputError(f"unknown model {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
