"""Generation settings of a checkpoint: its stop tokens and its repetition penalty."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable

from vl3_jax.config_tree import INT32
from vl3_jax.errors import InputError, printable, repr_of


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
            values = json.loads(path.read_bytes()) if path.is_file() else {}  # a byte-order mark is understood
            stop_ids = values.get("eos_token_id")
            stop_ids = [] if stop_ids is None else stop_ids if isinstance(stop_ids, list) else [stop_ids]
            penalty = values.get("repetition_penalty")
            penalty = 1.0 if penalty is None else float(penalty)
        except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise InputError(f"{path}: {error}; correct the file or remove it") from None
        for stop_id in stop_ids:
            if isinstance(stop_id, bool) or not isinstance(stop_id, int) or not 0 <= stop_id <= INT32:
                raise InputError(f"{path}: eos_token_id {printable(repr_of(stop_id))} is no token; correct the file")
        if not 0 < penalty < math.inf:
            raise InputError(f"{path}: repetition_penalty is {penalty}; give a number above 0, 1 for none")
        return cls(tuple(sorted({*end_ids, *stop_ids})), penalty)
