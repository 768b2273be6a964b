"""The rows of the engine: what each holds of earlier requests, and which one suits a new request best."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from vl3_jax.inference.requests import Generation


@dataclasses.dataclass(eq=False)
class CacheRow:
    """A row of the cache: what it holds, and the request that it belongs to.

    Attributes:
      index: Its number.
      held: [n] int64, the identities of the tokens in the cache (`token_identities`).
      adapter: Number of the adapter that they were read with; -1 for none.
      used: When it was used last.
      generation: The request, None while the row is free.
      work: Encodes and reads the prompt, piece by piece; None when all is read.
      fresh: Whether no token has been asked for yet.
      ahead: Tokens that a row with a constraint may generate in its next call of the decoder.
      taken_back: Tokens of the last call that the constraint refused and the answer does not hold.
    """

    index: int
    held: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    adapter: int = -1
    used: int = 0
    generation: Generation | None = None
    work: Iterator[None] | None = None
    fresh: bool = False
    ahead: int = 1
    taken_back: tuple[int, ...] = ()

    @property
    def decodes(self) -> bool:
        return self.generation is not None and self.work is None


def best_row(free: Sequence[CacheRow], identities: np.ndarray, adapter: int = -1) -> tuple[CacheRow, int]:
    """Returns the free row that a prompt takes, and the number of the prompt's tokens whose cache it holds.

    A conversation goes on in its row; one that shares only its beginning with others takes the oldest row.

    Args:
      free: Rows without a request.
      identities: [n] int64, the identities of the prompt's tokens (`token_identities`).
      adapter: Number of the adapter that answers; what was read with another one is of no use.
    """
    # The last token of the prompt is decoded, not read: it gives the first one of the answer.
    common = {row.index: common_length(row.held, identities[:-1]) if row.adapter == adapter else 0 for row in free}
    continued = {row.index: common[row.index] if 2 * common[row.index] >= len(row.held) else 0 for row in free}
    row = max(free, key=lambda row: (continued[row.index], -row.used))
    return row, common[row.index]


def common_length(held: np.ndarray, prompt: np.ndarray) -> int:
    """Returns the number of tokens with which both begin."""
    size = min(len(held), len(prompt))
    differ = np.flatnonzero(held[:size] != prompt[:size])
    return int(differ[0]) if differ.size else size
