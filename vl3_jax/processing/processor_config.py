"""Settings of the processor, and their values in a checkpoint folder."""

import dataclasses
import os
import pathlib
from typing import Any

from vl3_jax.config_tree import AMOUNT, CHOICES, COUNT, INT32, LIMITS, NONE, CheckedSettings, Limits
from vl3_jax.errors import InputError, SettingError
from vl3_jax.json_file import JsonObject, read_object
from vl3_jax.processing import diff_pruning, resize
from vl3_jax.processing.packed_batch import MAX_MERGE
from vl3_jax.processing.video_reader import MAX_FPS, MAX_SECONDS, FrameSamplingOptions

PREPROCESS_MODES = ("official", "native")
MERGES = (1, MAX_MERGE)
_FILES = ("config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_GREY = (0.5, 0.5, 0.5)
FPS = Limits(1e-6, MAX_FPS)
SECONDS = Limits(0, MAX_SECONDS)  # of a video


@dataclasses.dataclass(frozen=True)
class ProcessorConfig(CheckedSettings):
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
      prune_threshold: Change since the frame before up to which a video token is pruned (DiffFP), twice its mean in
        grey levels (0..255): 0.1 is 0.05 levels; None, which is 0 in a configuration, keeps every token.
      visual_budget: Vision tokens of a prompt after pruning, or up to 1 their share of those before. The threshold is
        the smallest one, from `prune_threshold` on, that keeps to it; None, which is 0 in a configuration, is no limit.
      prune_min_tokens: Tokens that every frame keeps.
      native_placeholders: Whether a prompt has the port's placeholder ids instead of `<image>`.
      threads: Threads of the video decoder; 0 lets FFmpeg choose, 1 suits many workers.
    """

    image_merge: int = dataclasses.field(default=1, metadata={CHOICES: MERGES})
    video_merge: int = dataclasses.field(default=2, metadata={CHOICES: MERGES})
    min_tokens: int = dataclasses.field(default=resize.MIN_TOKENS, metadata={LIMITS: COUNT})
    max_tokens: int = dataclasses.field(default=resize.MAX_TOKENS, metadata={LIMITS: COUNT})
    fps: float = dataclasses.field(default=FrameSamplingOptions.fps, metadata={LIMITS: FPS})
    max_frames: int = dataclasses.field(default=FrameSamplingOptions.max_frames, metadata={LIMITS: COUNT})
    image_mean: tuple[float, float, float] = dataclasses.field(default=_GREY, metadata={LIMITS: Limits(-1000, 1000)})
    image_std: tuple[float, float, float] = dataclasses.field(default=_GREY, metadata={LIMITS: Limits(1e-6, 1000)})
    preprocess: str = dataclasses.field(default=FrameSamplingOptions.preprocess, metadata={CHOICES: PREPROCESS_MODES})
    prune_threshold: float | None = dataclasses.field(
        default=diff_pruning.DEFAULT_THRESHOLD, metadata={NONE: 0.0, LIMITS: Limits(0, 1000)}
    )
    visual_budget: float | None = dataclasses.field(
        default=None, metadata={NONE: 0.0, LIMITS: Limits(above=0, most=INT32)}
    )
    prune_min_tokens: int = dataclasses.field(default=diff_pruning.DEFAULT_MIN_TOKENS, metadata={LIMITS: AMOUNT})
    native_placeholders: bool = False
    threads: int = dataclasses.field(default=FrameSamplingOptions.threads, metadata={LIMITS: Limits(0, 1024)})

    def __post_init__(self):
        super().__post_init__()
        if self.min_tokens > min(self.max_tokens, resize.MAX_TOKENS):  # every image would be enlarged to that
            raise SettingError(
                "min_tokens", self.min_tokens, f"give at most max_tokens, {self.max_tokens}, and {resize.MAX_TOKENS}"
            )
        budget = self.visual_budget
        if budget is not None and budget > 1 and budget % 1:
            raise SettingError("visual_budget", budget, "give a share up to 1 or a whole number of tokens")
        if budget is not None and self.prune_threshold is None:
            raise SettingError("visual_budget", budget, "it prunes, but pruning is off; leave one of them out")

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
        model, both, image_file, video_file = (read_object(pathlib.Path(folder, name)) for name in _FILES)
        image = JsonObject({**image_file, **both.section("image_processor")}, image_file.path)
        video = JsonObject({**video_file, **both.section("video_processor")}, video_file.path)
        found = {
            "image_merge": _first(both.integer("image_merge_size"), image.integer("merge_size")),
            "video_merge": _first(both.integer("video_merge_size"), video.integer("merge_size")),
            "fps": _first(both.number("fps"), video.number("fps")),
            "max_frames": _first(both.integer("max_frames"), video.integer("max_frames")),
            "image_mean": image.numbers("image_mean", 3),
            "image_std": image.numbers("image_std", 3),
            **_budget(image),
        }
        if model.text("model_type") == "video_llama_3":
            found["native_placeholders"] = True
        compress = _first(video.flag("use_token_compression", None), model.flag("use_token_compression", None))
        if compress is False:
            overrides.setdefault("prune_threshold", None)
        try:
            return cls(**{**{name: value for name, value in found.items() if value is not None}, **overrides})
        except InputError as error:
            raise InputError(f"{os.fspath(folder)}: {error}") from error


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _budget(image: JsonObject) -> dict[str, int | None]:
    """Returns the token limits; native files state them in pixels, under either of two names."""
    token_pixels = (resize.PATCH * (image.integer("merge_size") or 1)) ** 2
    size, limits = image.section("size"), {}
    for name, pixels, edge in (
        ("min_tokens", "min_pixels", "shortest_edge"),
        ("max_tokens", "max_pixels", "longest_edge"),
    ):
        in_pixels = _first(image.integer(pixels), size.integer(edge))
        limits[name] = _first(image.integer(name), in_pixels and max(in_pixels // token_pixels, 1))
    return limits
