"""How the paper asked its benchmarks: the preset of `vl3 eval`, recorded with every result."""

from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.evaluation.benchmark import Benchmark
from vl3_jax.inference import answer_settings
from vl3_jax.inference.answer_settings import ADAPTER, PROCESSOR, PRUNE, AnswerSettings
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.sa2va.vision_budget import DRAWING_MERGE, MOST_TOKENS, drawing_processor

# What the paper asked with, whatever a checkpoint says, whose are the merge size of videos, pruning and penalty.
PAPER = {"preprocess": "official", "fps": 1.0, "max_frames": 180, "max_visual_tokens": 16384, "max_new_tokens": 2048}
IMAGE_MERGE = 1  # of image benchmarks
DECODING = ("max_new_tokens", "repetition_penalty")  # which is greedy
_CHANGEABLE = (*PROCESSOR, PRUNE, *DECODING, ADAPTER)


class EvalProtocol:
    """What a model is asked with: the paper's settings, and others instead of some of them.

    Args:
      system: System prompt; None for none.
      **changes: Keywords of `ChatModel.answer`: those of the processing of media, `max_new_tokens`,
        `repetition_penalty` and `adapter`.

    Raises:
      InputError: There is no such setting, or it has a value that it cannot have.
    """

    def __init__(self, system: str | None = None, **changes: Any):
        for name in changes:
            if name not in _CHANGEABLE:
                raise InputError(f"unknown setting {name!r} of an evaluation; known are {', '.join(_CHANGEABLE)}")
        self.system, self._changes = system, changes
        self.settings(ProcessorConfig())

    def settings(
        self, checkpoint: ProcessorConfig, benchmark: Benchmark | None = None, repetition_penalty: float = 1.0
    ) -> AnswerSettings:
        """Returns the settings of an answer.

        Args:
          checkpoint: Settings of the checkpoint's processor.
          benchmark: What is asked; None is an image benchmark.
          repetition_penalty: That of the checkpoint.

        Raises:
          SettingError: The checkpoint's own settings do not go with a value.
        """
        is_image = benchmark is None or benchmark.kind == "image"
        keywords = PAPER | ({"image_merge": IMAGE_MERGE} if is_image else {}) | self._changes
        if benchmark is not None and benchmark.max_new_tokens:
            keywords["max_new_tokens"] = min(keywords["max_new_tokens"], benchmark.max_new_tokens)
        if benchmark is not None and (benchmark.draws or benchmark.shows_regions):
            keywords |= {"image_merge": DRAWING_MERGE, "max_visual_tokens": MOST_TOKENS, **self._changes}
            checkpoint = drawing_processor(checkpoint, not is_image, keywords["max_visual_tokens"])
        sampling = SamplingConfig(repetition_penalty=repetition_penalty)
        return answer_settings.resolve(keywords, sampling, checkpoint)

    def record(self, checkpoint: ProcessorConfig, repetition_penalty: float) -> dict[str, Any]:
        """Returns what is used, JSON values for the results; the arguments are those of `settings`."""
        used = self.settings(checkpoint, repetition_penalty=repetition_penalty)
        fields = {**PROCESSOR, "video_merge": "video_merge", "min_tokens": "min_tokens"}
        media = {name: getattr(used.processor, field) for name, field in fields.items()}
        others = self._changes.get("image_merge", checkpoint.image_merge)
        media["image_merge"] = {"image benchmarks": media["image_merge"], "others": others}
        masks = {"image_merge": DRAWING_MERGE, "max_visual_tokens": MOST_TOKENS, **self._changes}
        media["benchmarks of masks"] = {name: masks[name] for name in ("image_merge", "max_visual_tokens")}
        decoding = {name: getattr(used.sampling, name) for name in DECODING}
        return {"system": self.system, "decoding": "greedy", **media, **decoding, ADAPTER: used.adapter}
