"""Configurations of SAM-2 (arXiv 2408.00714): the four Hiera sizes, the settings of 2.0 and 2.1, and those of Sa2VA."""

import dataclasses
import math
from typing import Literal

STAGES = 4  # of the trunk, with strides 4, 8, 16 and 32
PATCH_KERNEL, PATCH_STRIDE = 7, 4
STRIDE = 16  # pixels of the input image in a cell of the feature map that prompts and memories meet
MASK_STRIDE = 4  # pixels of the input image in a pixel of a low-resolution mask
MASK_TOKENS = 4  # one mask alone, then three for an ambiguous prompt
POINT_KINDS = 4  # background, foreground, the first and the second corner of a box
RGB = 3

_LARGEST = 2**16


def _check_sizes(name: str, values: object, count: int | None, low: int = 1) -> None:
    listed = values if isinstance(values, tuple) and count in (None, len(values)) else (None,)
    if not all(type(value) is int and low <= value <= _LARGEST for value in listed):
        raise ValueError(f"{name} is {values!r}; expected {count or 'some'} integers from {low} to {_LARGEST}")


@dataclasses.dataclass(frozen=True)
class HieraConfig:
    """Configuration of the Hiera trunk; sequences have an entry for each of the four stages.

    Attributes:
      widths: Channels of each stage.
      heads: Attention heads of each stage.
      depths: Blocks of each stage.
      windows: Side of the attention windows of each stage. The first block of a stage has those of the stage before.
      global_blocks: Blocks, counted from 0 over all stages, that attend to the whole map.
      position_size: Rows and columns of the position embedding that is interpolated to the map.
      mlp_ratio: Hidden width of the MLPs, as a multiple of their width.
      layer_norm_eps: Added to the variance in layer normalisations.
    """

    widths: tuple[int, ...] = (96, 192, 384, 768)
    heads: tuple[int, ...] = (1, 2, 4, 8)
    depths: tuple[int, ...] = (1, 2, 7, 2)
    windows: tuple[int, ...] = (8, 4, 14, 7)
    global_blocks: tuple[int, ...] = (5, 7, 9)
    position_size: tuple[int, int] = (7, 7)
    mlp_ratio: float = 4.0
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        for name in ("widths", "heads", "depths", "windows"):
            _check_sizes(name, getattr(self, name), STAGES)
        _check_sizes("position_size", self.position_size, 2)
        _check_sizes("global_blocks", self.global_blocks, None, low=0)
        if max(self.global_blocks, default=0) >= sum(self.depths):
            raise ValueError(f"global_blocks is {self.global_blocks!r}; the trunk has {sum(self.depths)} blocks")
        if any(width % heads for width, heads in zip(self.widths, self.heads, strict=True)):
            raise ValueError(f"widths {self.widths!r} do not divide over the heads {self.heads!r}")
        if any(first == second for first, second in zip(self.widths, self.widths[1:], strict=False)):
            raise ValueError(f"widths is {self.widths!r}; each stage needs a width other than that of the stage before")
        if any(window % 2 for window in self.windows[:-1]):
            raise ValueError(f"windows is {self.windows!r}; those before a pooling must be even")
        if not 0 < self.mlp_ratio <= 64 or not 0 < self.layer_norm_eps < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio!r} or layer_norm_eps {self.layer_norm_eps!r} out of range")

    @property
    def first_blocks(self) -> tuple[int, ...]:
        """The first block of each stage, counted over all stages."""
        return tuple(sum(self.depths[:stage]) for stage in range(STAGES))

    def mlp_width(self, stage: int) -> int:
        """Hidden width of the MLPs of a stage."""
        return int(self.widths[stage] * self.mlp_ratio)


@dataclasses.dataclass(frozen=True)
class Sam2Config:
    """Configuration of SAM-2: image encoder, prompt encoder, mask decoder and memory.

    Attributes:
      hiera: Trunk of the image encoder.
      image_size: Height and width of the input image.
      width: Channels of the stride-16 features, of prompts and of object pointers.
      memory_width: Channels of a memory.
      decoder_layers, decoder_heads, decoder_mlp: Two-way transformer of the mask decoder.
      decoder_downsample: Width of the decoder over that inside its cross-attention.
      iou_width, iou_layers: MLP that predicts the IoU of each mask.
      prompt_mask_width: Channels to which a mask prompt is reduced before it is embedded.
      memory_layers, memory_heads, memory_mlp: Memory attention.
      fuser_layers, fuser_mlp, fuser_kernel: Convolutional blocks of the memory encoder.
      num_memories: Conditioning frames count as one; the others are the latest tracked frames.
      num_pointers: Object pointers of tracked frames are used up to this distance, exclusively.
      pointer_time: Whether object pointers carry their distance in time (2.1).
      occlusion: Whether memories of absent objects are marked (2.1).
      memory_scale, memory_bias: What a mask's probability is multiplied by, and added to, for the memory encoder.
      max_points: Prompts of at most this many points are ambiguous, and the best of three masks is taken.
      multimask, multimask_tracking: Whether that holds for conditioning frames and for tracked ones.
      stability_fallback, stability_delta, stability_threshold: A single mask whose area changes by more, between
        thresholds of -delta and delta, than the stability threshold allows is replaced by the best of three.
      mask_absent_objects: Whether all logits of an object that is absent are -1024; not so in Sa2VA.
      binarize_prompted_memory: Whether masks that follow from prompts are remembered as 0 and 1; not so in Sa2VA.
      two_step_masks: Whether masks are enlarged to the input image and then to the video, as in Sa2VA.
      resample: How images are resized to the input.
      image_mean, image_std: Normalise pixels that are scaled to 0..1, on the device.
    """

    hiera: HieraConfig = HieraConfig()
    image_size: int = 1024
    width: int = 256
    memory_width: int = 64
    decoder_layers: int = 2
    decoder_heads: int = 8
    decoder_mlp: int = 2048
    decoder_downsample: int = 2
    iou_width: int = 256
    iou_layers: int = 3
    prompt_mask_width: int = 16
    memory_layers: int = 4
    memory_heads: int = 1
    memory_mlp: int = 2048
    fuser_layers: int = 2
    fuser_mlp: int = 1024
    fuser_kernel: int = 7
    num_memories: int = 7
    num_pointers: int = 16
    pointer_time: bool = True
    occlusion: bool = True
    memory_scale: float = 20.0
    memory_bias: float = -10.0
    max_points: int = 1
    multimask: bool = True
    multimask_tracking: bool = True
    stability_fallback: bool = True
    stability_delta: float = 0.05
    stability_threshold: float = 0.98
    rope_theta: float = 10_000.0
    mask_absent_objects: bool = True
    binarize_prompted_memory: bool = True
    two_step_masks: bool = False
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                low = 0 if field.name == "max_points" else 1
                _check_sizes(field.name, (value,), 1, low)
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{field.name} is {value!r}; expected true or false")
            if field.type is float and not (isinstance(value, int | float) and math.isfinite(value)):
                raise ValueError(f"{field.name} is {value!r}; expected a number")
        if self.image_size % (2 * STRIDE):
            raise ValueError(f"image_size is {self.image_size}; expected a multiple of {2 * STRIDE}")
        if self.image_size // PATCH_STRIDE % self.hiera.windows[0]:
            raise ValueError(
                f"image_size is {self.image_size}; windows of {self.hiera.windows[0]} must tile its patches"
            )
        if self.width % self.memory_width or self.width % 8 or self.memory_width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 8 and of memory_width {self.memory_width}")
        inner = self.width // self.decoder_downsample
        if inner % self.decoder_heads or self.width % (4 * self.memory_heads):
            raise ValueError(f"width {self.width} does not divide over the attention heads")
        if self.num_memories < 2 or self.num_pointers < 2 or self.iou_layers < 2:
            raise ValueError("num_memories, num_pointers and iou_layers must be at least 2")
        if self.num_pointers < self.num_memories:
            raise ValueError(f"num_pointers is {self.num_pointers}, less than num_memories {self.num_memories}")

    @property
    def grid(self) -> int:
        """Rows, and columns, of the stride-16 feature map."""
        return self.image_size // STRIDE

    @property
    def mask_size(self) -> int:
        """Rows, and columns, of a low-resolution mask."""
        return self.image_size // MASK_STRIDE

    @property
    def tokens_per_pointer(self) -> int:
        """Tokens of a memory's width that an object pointer is cut into."""
        return self.width // self.memory_width


_SIZES = {
    "tiny": HieraConfig(),
    "small": HieraConfig(depths=(1, 2, 11, 2), global_blocks=(7, 10, 13)),
    "base-plus": HieraConfig(
        widths=(112, 224, 448, 896),
        heads=(2, 4, 8, 16),
        depths=(2, 3, 16, 3),
        global_blocks=(12, 16, 20),
        position_size=(14, 14),
    ),
    "large": HieraConfig(
        widths=(144, 288, 576, 1152),
        heads=(2, 4, 8, 16),
        depths=(2, 6, 36, 4),
        windows=(8, 4, 16, 8),
        global_blocks=(23, 33, 43),
    ),
}
SIZES = tuple(_SIZES)


def sam2_preset(size: str, version: str = "2.1") -> Sam2Config:
    """Returns the configuration of a released model.

    Args:
      size: "tiny", "small", "base-plus" or "large".
      version: "2.0" or "2.1".

    Raises:
      ValueError: The size or the version is unknown.
    """
    if size not in SIZES or version not in ("2.0", "2.1"):
        raise ValueError(f"no SAM {version} of size {size!r}; sizes are {', '.join(SIZES)}, versions 2.0 and 2.1")
    return Sam2Config(_SIZES[size], pointer_time=version == "2.1", occlusion=version == "2.1")


def sa2va_settings(config: Sam2Config) -> Sam2Config:
    """Returns the configuration with which Sa2VA runs the SAM-2 of `config`."""
    return dataclasses.replace(
        config,
        pointer_time=False,
        occlusion=False,
        mask_absent_objects=False,
        binarize_prompted_memory=False,
        two_step_masks=True,
        resample="bicubic",
    )
