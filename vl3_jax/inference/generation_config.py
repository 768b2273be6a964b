"""Generation settings of a checkpoint: its stop tokens and its repetition penalty."""

import dataclasses
import os
import pathlib
from collections.abc import Iterable

from vl3_jax.config_tree import LIMITS
from vl3_jax.inference.sampling_config import SamplingConfig
from vl3_jax.json_file import read_object


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """The parts of `generation_config.json` that are used.

    Attributes:
      stop_ids: End-of-sequence ids of the file and of the tokenizer, sorted.
      repetition_penalty: The file's repetition penalty, 1.0 if it has none.
    """

    stop_ids: tuple[int, ...]
    repetition_penalty: float = 1.0

    @classmethod
    def read(cls, folder: str | os.PathLike, end_ids: Iterable[int]) -> "GenerationConfig":
        """Reads `folder/generation_config.json`; without that file there is no penalty and only `end_ids` stop.

        Args:
          folder: The checkpoint folder.
          end_ids: The tokenizer's end-of-sequence ids.

        Raises:
          InputError: The file cannot be parsed, or a value has another type or is out of its range.
        """
        values = read_object(pathlib.Path(folder) / "generation_config.json")
        limits = SamplingConfig.__dataclass_fields__["repetition_penalty"].metadata[LIMITS]
        penalty = values.number("repetition_penalty", 1.0, limits.least, limits.most)
        return cls(tuple(sorted({*end_ids, *values.integers("eos_token_id")})), penalty)
