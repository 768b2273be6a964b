"""Model configurations: the sizes that determine the parameters' shapes and the forward pass.

Sources: the released `config.json` files (arXiv 2501.13106; DAMO-NLP-SG/VideoLLaMA3-2B and -7B).
"""

import dataclasses

from vl3_jax.errors import InputError


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
