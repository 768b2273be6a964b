"""How the paper asked its benchmarks: the preset of `vl3 eval`, recorded with every result."""

import dataclasses
from typing import Any

from vl3_jax.processing.processor_config import ProcessorConfig


@dataclasses.dataclass(frozen=True)
class EvalProtocol:
    """What a model is asked with. The defaults are the paper's.

    Attributes:
      preprocess: Frame sampling and resize rule.
      fps: Frames sampled per second of video.
      max_frames: Largest number of frames of a video.
      max_tokens: Budget of vision tokens before pruning, of a prompt.
      image_merge: Merge size of the images of image benchmarks, whatever the checkpoint says.
      system_prompt: System prompt; None for none.
      max_new_tokens: Maximum number of tokens of an answer.
      repetition_penalty: None is that of the checkpoint's generation_config.json.
    """

    preprocess: str = "official"
    fps: float = 1.0
    max_frames: int = 180
    max_tokens: int = 16384
    image_merge: int = 1
    system_prompt: str | None = None
    max_new_tokens: int = 2048
    repetition_penalty: float | None = None

    def processor_config(self, checkpoint: ProcessorConfig, kind: str) -> ProcessorConfig:
        """Returns the settings of the processor.

        Args:
          checkpoint: The settings of the checkpoint; merge size of videos, pruning and normalisation stay theirs.
          kind: "image" or "video", the kind of the benchmark.
        """
        image_merge = self.image_merge if kind == "image" else checkpoint.image_merge
        shared = {name: getattr(self, name) for name in ("preprocess", "fps", "max_frames", "max_tokens")}
        return dataclasses.replace(checkpoint, image_merge=image_merge, **shared)

    def record(self, config: ProcessorConfig, repetition_penalty: float) -> dict[str, Any]:
        """Returns what was used, JSON values for the results.

        Args:
          config: The settings of the processor that asked.
          repetition_penalty: The penalty in use.
        """
        used = dataclasses.asdict(self) | {"repetition_penalty": repetition_penalty, "decoding": "greedy"}
        return used | {"processor": dataclasses.asdict(config)}
