"""The settings that decide how records become rows, and which of them an index depends on."""

import dataclasses
import hashlib
import json
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.processing.packed_batch import BatchShape
from vl3_jax.processing.processor_config import ProcessorConfig


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """How records become rows.

    Attributes:
      shape: Capacities of a row.
      processor: Settings of the processor. Its `max_tokens` caps one sample; each video has one decoder thread,
        because several samples are read at a time.
      max_frame_patches: Largest number of patches of an image or frame.
      trainer_streams: Whether live streams are written and supervised as by the official trainer, see
        `chat_template.PromptStyle`.
    """

    shape: BatchShape
    processor: ProcessorConfig
    max_frame_patches: int = 16_384
    trainer_streams: bool = False

    def __post_init__(self):
        shape = self.shape
        for name, capacity in dataclasses.asdict(shape).items():
            if capacity < 1:
                raise InputError(f"{name} is {capacity}; give at least 1")
        if shape.vision_tokens > shape.length:
            raise InputError(f"vision_tokens {shape.vision_tokens} exceed length {shape.length}; lower them")

    def index_key(self, kept: bool) -> dict[str, Any]:
        """Returns the settings that the lengths of an index depend on; with kept counts, also sizes and pruning."""
        config = dataclasses.asdict(self.processor)
        config.pop("threads")
        always = ("fps", "max_frames", "preprocess", "native_placeholders")
        chosen = config if kept else {name: config[name] for name in always}
        return {"trainer_streams": self.trainer_streams, "kept": kept, **chosen}


def fingerprint(value: Any) -> str:
    """Returns 16 hexadecimal digits that identify a value which JSON can hold."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
