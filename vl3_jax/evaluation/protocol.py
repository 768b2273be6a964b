"""How the paper asked its benchmarks: the preset of `vl3 eval`, recorded with every result."""

import dataclasses
from typing import Any

from vl3_jax import config_tree
from vl3_jax.config_tree import CHOICES, INT32, LIMITS, Limits
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.processing.processor_config import COUNT, FPS, MERGES, PREPROCESS_MODES, ProcessorConfig


@dataclasses.dataclass(frozen=True)
class EvalProtocol:
    """What a model is asked with. The defaults are the paper's.

    Attributes:
      preprocess: Frame sampling and resize rule.
      fps: Frames sampled per second of video.
      max_frames: Largest number of frames of a video.
      max_visual_tokens: Budget of vision tokens before pruning, of a prompt.
      image_merge: Merge size of the images of image benchmarks, whatever the checkpoint says.
      prune: Whether video tokens are pruned as the checkpoint says; otherwise every token is kept.
      system: System prompt; None for none.
      max_new_tokens: Maximum number of tokens of an answer.
      repetition_penalty: None is that of the checkpoint's generation_config.json.
    """

    preprocess: str = dataclasses.field(default="official", metadata={CHOICES: PREPROCESS_MODES})
    fps: float = dataclasses.field(default=1.0, metadata={LIMITS: FPS})
    max_frames: int = dataclasses.field(default=180, metadata={LIMITS: COUNT})
    max_visual_tokens: int = dataclasses.field(default=16384, metadata={LIMITS: COUNT})
    image_merge: int = dataclasses.field(default=1, metadata={CHOICES: MERGES})
    prune: bool = True
    system: str | None = None
    max_new_tokens: int = dataclasses.field(default=2048, metadata={LIMITS: Limits(1, INT32)})
    repetition_penalty: float | None = dataclasses.field(default=None, metadata={LIMITS: Limits(0.001, 1000)})

    def __post_init__(self):
        config_tree.check(self)

    def processor_config(self, checkpoint: ProcessorConfig, kind: str) -> ProcessorConfig:
        """Returns the settings of the processor.

        Args:
          checkpoint: The settings of the checkpoint; merge size of videos, pruning and normalisation stay theirs.
          kind: `Benchmark.kind`.

        Raises:
          SettingError: The checkpoint's own settings do not go with a value.
        """
        changes: dict[str, Any] = {name: getattr(self, name) for name in ("preprocess", "fps", "max_frames")}
        changes |= {"max_tokens": self.max_visual_tokens}
        changes |= {"image_merge": self.image_merge} if kind == "image" else {}
        changes |= {} if self.prune else {"prune_threshold": None}
        return dataclasses.replace(checkpoint, **changes)

    def sampling(self, checkpoint_penalty: float, most_new_tokens: int | None = None) -> SamplingConfig:
        """Returns the settings of decoding, which is greedy.

        Args:
          checkpoint_penalty: Repetition penalty of the checkpoint.
          most_new_tokens: `Benchmark.max_new_tokens`.
        """
        new_tokens = min(self.max_new_tokens, most_new_tokens or self.max_new_tokens)
        return SamplingConfig(new_tokens, repetition_penalty=self.repetition_penalty or checkpoint_penalty)

    def record(self, checkpoint: ProcessorConfig, checkpoint_penalty: float) -> dict[str, Any]:
        """Returns what is used, JSON values for the results.

        Args:
          checkpoint: The settings of the checkpoint's processor.
          checkpoint_penalty: Its repetition penalty.
        """
        config = self.processor_config(checkpoint, "image")
        own = {name: getattr(config, name) for name in ("video_merge", "min_tokens", "prune_threshold")}
        penalty = self.sampling(checkpoint_penalty).repetition_penalty
        return dataclasses.asdict(self) | own | {"repetition_penalty": penalty, "decoding": "greedy"}
