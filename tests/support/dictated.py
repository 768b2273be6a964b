"""A constraint that one answer alone matches, special tokens and all."""

from collections.abc import Sequence

import numpy as np


class Dictated:
    """Lets a model say nothing but given tokens, in the place of a `TokenConstraint`."""

    is_led = False
    matches = True

    def __init__(self, answer: Sequence[int]):
        self._left = list(answer)

    @property
    def is_complete(self) -> bool:
        return not self._left

    def write_mask(self, mask: np.ndarray) -> None:
        mask[:] = 0
        mask[self._left[0] // 32] = np.uint32(1 << self._left[0] % 32)

    def accept(self, tokens: list[int]) -> int:
        kept = 0
        while self._left and kept < len(tokens) and tokens[kept] == self._left[0]:
            del self._left[0]
            kept += 1
        return kept
