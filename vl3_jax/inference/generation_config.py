"""Generation settings of a checkpoint: its stop tokens and its repetition penalty."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable

from vl3_jax.errors import InputError


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
          InputError: The file cannot be parsed.
        """
        path = pathlib.Path(folder) / "generation_config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            stop_ids = values.get("eos_token_id") or []
            stop_ids = [stop_ids] if isinstance(stop_ids, int) else [int(stop_id) for stop_id in stop_ids]
            penalty = float(values.get("repetition_penalty") or 1.0)
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: {str(error).splitlines()[0]}; correct the file or remove it") from None
        return cls(tuple(sorted({*end_ids, *stop_ids})), penalty)
