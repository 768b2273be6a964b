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
      shorter_lengths: Tokens of rows that are shorter than `shape.length`; others are ignored.
      max_frame_patches: Largest number of patches of an image or frame.
      trainer_streams: Whether live streams are written and supervised as by the official trainer, see
        `chat_template.PromptStyle`.
    """

    shape: BatchShape
    processor: ProcessorConfig
    shorter_lengths: tuple[int, ...] = ()
    max_frame_patches: int = 40_960
    trainer_streams: bool = False

    def __post_init__(self):
        shape = self.shape
        capacities = dataclasses.asdict(shape) | {"shorter_lengths": min(self.lengths)}
        for name, capacity in capacities.items():
            if capacity < 1:
                raise InputError(f"{name} is {capacity}; give at least 1")
        if shape.vision_tokens > shape.length:
            raise InputError(f"vision_tokens {shape.vision_tokens} exceed length {shape.length}; lower them")

    @property
    def lengths(self) -> list[int]:
        """Numbers of tokens that a row may have, ascending. The rows of a step have the same."""
        return sorted({self.shape.length, *(n for n in self.shorter_lengths if n < self.shape.length)})

    def row_shape(self, length: int) -> BatchShape:
        """Returns the capacities of a row of one of the `lengths`."""
        return dataclasses.replace(self.shape, length=length, vision_tokens=min(self.shape.vision_tokens, length))

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
