"""Settings of the processor, and their values in a checkpoint folder."""

import dataclasses
import json
import math
import os
from typing import Any

from vl3_jax import config_tree
from vl3_jax.config_tree import CHOICES, INT32, LIMITS, NONE, Limits
from vl3_jax.errors import InputError, SettingError
from vl3_jax.processing import diff_pruning, resize
from vl3_jax.processing.packed_batch import MAX_MERGE
from vl3_jax.processing.video_reader import FrameSamplingOptions

PREPROCESS_MODES = ("official", "native")
MERGES = (1, MAX_MERGE)
_GREY = (0.5, 0.5, 0.5)
_COUNT = Limits(1, INT32)


@dataclasses.dataclass(frozen=True)
class ProcessorConfig:
    """Settings of a processor.

    Attributes:
      image_merge: Patches each way that become one vision token of an image, 1 or 2.
      video_merge: Patches each way that become one vision token of a video frame, 1 or 2.
      min_tokens: Vision tokens that an image or frame is enlarged to at least.
      max_tokens: Budget of vision tokens before pruning, of a prompt (official) or an item (native).
      fps: Frames sampled per second of video.
      max_frames: Largest number of frames of a video; more are thinned out evenly.
      image_mean: Mean of each channel of pixels in 0..1.
      image_std: Standard deviation of each channel of pixels in 0..1.
      preprocess: Frame sampling and resize rule, "official" (of the original release, as the weights were trained) or
        "native" (of the transformers port).
      prune_threshold: Mean difference of pixels up to which a video token is pruned (DiffFP); None, which is 0 in a
        configuration, keeps every token.
      prune_min_tokens: Tokens that every frame keeps.
      native_placeholders: Whether a prompt has the port's placeholder ids instead of `<image>`.
      threads: Threads of the video decoder; 0 lets FFmpeg choose, 1 suits many workers.
    """

    image_merge: int = dataclasses.field(default=1, metadata={CHOICES: MERGES})
    video_merge: int = dataclasses.field(default=2, metadata={CHOICES: MERGES})
    min_tokens: int = dataclasses.field(default=resize.MIN_TOKENS, metadata={LIMITS: _COUNT})
    max_tokens: int = dataclasses.field(default=resize.MAX_TOKENS, metadata={LIMITS: _COUNT})
    fps: float = dataclasses.field(default=FrameSamplingOptions.fps, metadata={LIMITS: Limits(above=0, most=1_000_000)})
    max_frames: int = dataclasses.field(default=FrameSamplingOptions.max_frames, metadata={LIMITS: _COUNT})
    image_mean: tuple[float, float, float] = _GREY
    image_std: tuple[float, float, float] = _GREY
    preprocess: str = dataclasses.field(default=FrameSamplingOptions.preprocess, metadata={CHOICES: PREPROCESS_MODES})
    prune_threshold: float | None = dataclasses.field(
        default=diff_pruning.DEFAULT_THRESHOLD, metadata={NONE: 0.0, LIMITS: Limits(0, 1000)}
    )
    prune_min_tokens: int = dataclasses.field(
        default=diff_pruning.DEFAULT_MIN_TOKENS, metadata={LIMITS: Limits(0, INT32)}
    )
    native_placeholders: bool = False
    threads: int = dataclasses.field(default=FrameSamplingOptions.threads, metadata={LIMITS: Limits(0, 1024)})

    def __post_init__(self):
        config_tree.check(self, ProcessorConfig)
        if not all(map(math.isfinite, self.image_mean)):
            raise SettingError("image_mean", self.image_mean, "give three numbers")
        if not all(0 < value < math.inf for value in self.image_std):
            raise SettingError("image_std", self.image_std, "give three numbers above 0")

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, **overrides: Any) -> "ProcessorConfig":
        """Reads the settings of a checkpoint folder, official or native; what its files do not say keeps its default.

        Args:
          folder: Folder with some of config.json, processor_config.json, preprocessor_config.json and
            video_preprocessor_config.json.
          **overrides: Fields that take precedence over the files.

        Raises:
          InputError: A file is not JSON, or a setting is impossible; names the file.
        """
        model, both = _read(folder, "config.json"), _read(folder, "processor_config.json")
        image = {**_read(folder, "preprocessor_config.json"), **both.get("image_processor", {})}
        video = {**_read(folder, "video_preprocessor_config.json"), **both.get("video_processor", {})}
        found = {
            "image_merge": _first(both.get("image_merge_size"), image.get("merge_size")),
            "video_merge": _first(both.get("video_merge_size"), video.get("merge_size")),
            "fps": _first(both.get("fps"), video.get("fps")),
            "max_frames": _first(both.get("max_frames"), video.get("max_frames")),
            "image_mean": _channels(image.get("image_mean")),
            "image_std": _channels(image.get("image_std")),
            **_budget(image),
        }
        if model.get("model_type") == "video_llama_3":
            found["native_placeholders"] = True
        if _first(video.get("use_token_compression"), model.get("use_token_compression")) is False:
            overrides.setdefault("prune_threshold", None)
        try:
            return cls(**{**{name: value for name, value in found.items() if value is not None}, **overrides})
        except InputError as error:
            raise InputError(f"{os.fspath(folder)}: {error}") from error


def _read(folder: str | os.PathLike, file: str) -> dict[str, Any]:
    path = os.path.join(folder, file)
    if not os.path.exists(path):
        return {}
    try:
        with open(path, "rb") as opened:
            content = json.loads(opened.read())  # from bytes, a byte-order mark is understood
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); replace the file") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not settings; replace the file")
    return content


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _channels(value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    return (float(value),) * 3 if isinstance(value, int | float) else tuple(map(float, value))


def _budget(image: dict[str, Any]) -> dict[str, int | None]:
    """Returns the token limits; native files state them in pixels, under either of two names."""
    token_pixels = (resize.PATCH * (image.get("merge_size") or 1)) ** 2
    size = image.get("size") or {}
    limits = {}
    for name, pixels, edge in (
        ("min_tokens", "min_pixels", "shortest_edge"),
        ("max_tokens", "max_pixels", "longest_edge"),
    ):
        in_pixels = _first(image.get(pixels), size.get(edge))
        limits[name] = _first(image.get(name), in_pixels and max(in_pixels // token_pixels, 1))
    return limits
