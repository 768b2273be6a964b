"""What a checkpoint says about generation: its stop tokens and its repetition penalty."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable

from vl3_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """From `generation_config.json`, as far as it is used.

    Attributes:
      stop_ids: the file's end-of-sequence ids and those of the tokenizer's own end tokens.
      repetition_penalty: 1.0 where the file has none.
    """

    stop_ids: tuple[int, ...]
    repetition_penalty: float = 1.0

    @classmethod
    def read(cls, folder: str | os.PathLike, end_ids: Iterable[int]) -> "GenerationConfig":
        """Reads `folder/generation_config.json`; without one, the tokenizer's end tokens and no penalty.

        Raises:
          InputError: the file is not what it should be.
        """
        path = pathlib.Path(folder) / "generation_config.json"
        if not path.is_file():
            return cls(tuple(sorted(set(end_ids))))
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            stops = values.get("eos_token_id") or []
            stops = [stops] if isinstance(stops, int) else [int(stop) for stop in stops]
            penalty = float(values.get("repetition_penalty") or 1.0)
        except (ValueError, TypeError, AttributeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: {str(error).splitlines()[0]}; correct the file or remove it") from None
        return cls(tuple(sorted({*end_ids, *stops})), penalty)
