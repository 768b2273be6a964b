"""Constraints of answers token by token: which tokens may come next, computed on the host by llguidance."""

import collections
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vl3_jax.errors import RunError
from vl3_jax.inference.constraint_config import ConstraintConfig
from vl3_jax.processing.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_KEPT = 32  # compiled grammars


class TokenConstraint:
    """What one answer may still become.

    Args:
      matcher: The grammar, before the first token.
      stop_ids: Tokens that end an answer; they are allowed where the grammar accepts.
    """

    def __init__(self, matcher: "LLMatcher", stop_ids: Sequence[int]):
        self._matcher, self._stop_ids = matcher, np.array(stop_ids, np.int64)
        self.is_complete = False  # whether nothing may follow

    @property
    def matches(self) -> bool:
        """Whether the answer so far is one that the grammar accepts."""
        return self.is_complete or self._matcher.is_accepting()

    def write_mask(self, mask: np.ndarray) -> None:
        """Writes the tokens that may come next, at least one, into a mask [W] uint32 (see `token_masks`).

        Raises:
          RunError: The grammar is too complex, or a schema contradicts itself.
        """
        mask[:] = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(mask)]  # one more than it needs
        words, bits = self._stop_ids // 32, (1 << self._stop_ids % 32).astype(np.uint32)
        if self._matcher.is_accepting():
            np.bitwise_or.at(mask, words, bits)
        else:
            np.bitwise_and.at(mask, words, ~bits)
        if self._matcher.is_error() or not mask.any():
            reason = " ".join(self._matcher.get_error().split()) or "no text matches it from here on"
            raise RunError(f"the constraint of an answer cannot be followed: {reason}")

    def accept(self, tokens: Sequence[int]) -> int:
        """Appends tokens as far as they are allowed, and returns how many are."""
        stops = [index for index, token in enumerate(tokens) if token in self._stop_ids]
        text = list(tokens[: stops[0]] if stops else tokens)
        kept = self._matcher.try_consume_tokens(text) if text else 0
        self.is_complete = self._matcher.is_stopped() and self._matcher.is_accepting()
        if stops and kept == len(text) and self._matcher.is_accepting() and not self.is_complete:
            kept, self.is_complete = kept + 1, True
        return kept


class ConstraintCompiler:
    """Compiles constraints for the tokens of a model. It may be used from several threads.

    Args:
      tokenizer: Tokenizer of the checkpoint.
      stop_ids: Tokens that end an answer.
      vocab_size: Rows of the model's vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int], vocab_size: int):
        self._source, self._stop_ids, self._vocab_size = tokenizer, tuple(stop_ids), vocab_size
        self._tokenizer: LLTokenizer | None = None
        self._compiled: collections.OrderedDict[ConstraintConfig, LLMatcher] = collections.OrderedDict()
        self._lock = threading.Lock()

    def compile(self, config: ConstraintConfig) -> TokenConstraint | None:
        """Returns the constraint of a new answer; None if it is free."""
        if config.is_free:
            return None
        from llguidance import LLMatcher, LLTokenizer

        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = LLTokenizer(self._source.to_json(), n_vocab=self._vocab_size)
            if config not in self._compiled:
                self._compiled[config] = LLMatcher(self._tokenizer, config.grammar(), log_level=0)
            self._compiled.move_to_end(config)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
            return TokenConstraint(self._compiled[config].deep_copy(), self._stop_ids)
