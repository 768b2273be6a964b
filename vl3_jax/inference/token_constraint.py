"""Constraints of answers token by token: which tokens may come next, computed on the host by llguidance."""

import collections
import copy
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vl3_jax.errors import RunError, SettingError
from vl3_jax.inference.constraint_config import ConstraintConfig
from vl3_jax.inference.early_end import EndFinder, JsonText
from vl3_jax.inference.token_masks import mask_words
from vl3_jax.processing.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

_KEPT = 32  # compiled grammars
_NUMBER_GOES_ON = r"[0-9.eE+\-](?s:.)*"
_NEAR_END = 64  # tokens before the end from which the way to it is known after each token


class ConstraintTokens:
    """The tokens of a model, as constraints need them.

    Args:
      tokenizer: Tokenizer of the checkpoint.
      stop_ids: Tokens that end an answer; they are allowed where the grammar accepts.
      vocab_size: Rows of the model's vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int], vocab_size: int):
        from llguidance import LLMatcher, LLTokenizer

        self.tokenizer: LLTokenizer = LLTokenizer(tokenizer.to_json(), n_vocab=vocab_size)
        self.stop_ids = frozenset(stop_ids)
        self.stops = np.zeros(mask_words(vocab_size), np.uint32)
        for token in stop_ids:
            self.stops[token // 32] |= np.uint32(1 << token % 32)
        matcher = LLMatcher(self.tokenizer, LLMatcher.grammar_from_regex(_NUMBER_GOES_ON))
        self.number_goes_on = allowed_tokens(matcher, len(self.stops))
        self.ends = EndFinder(self.tokenizer)


class TokenConstraint:
    """What one answer may still become.

    Args:
      matcher: The grammar, before the first token.
      tokens: The tokens of the model.
      is_json: Whether the answer is JSON.
      max_new_tokens: Tokens of the answer at most; near their end it is led to one at which it matches.

    Attributes:
      is_complete: Whether nothing may follow.
      is_led: Whether the end of the answer was chosen for want of tokens.
    """

    def __init__(self, matcher: "LLMatcher", tokens: ConstraintTokens, is_json: bool, max_new_tokens: int):
        self._matcher, self._tokens, self._remaining = matcher, tokens, max_new_tokens
        self._json = JsonText() if is_json else None
        self._way: list[int] | None = None  # to an end, from here; None if it was not looked for
        self._next_look = max_new_tokens
        self.is_complete = self.is_led = False
        self._look_for_end()

    @property
    def matches(self) -> bool:
        """Whether the answer so far is one that the grammar accepts."""
        return self.is_complete or self._matcher.is_accepting()

    def write_mask(self, mask: np.ndarray) -> None:
        """Writes the tokens that may come next, at least one, into a mask [W] uint32 (see `token_masks`).

        Raises:
          RunError: The grammar is too complex, or a schema contradicts itself.
        """
        if self._way and self.is_led:
            _only(self._way[0], mask)
            return
        mask[:] = allowed_tokens(self._matcher, len(mask)) & ~self._tokens.stops
        if self._matcher.is_accepting():
            mask |= self._tokens.stops
        if self._number_is_long:
            if (mask & ~self._tokens.number_goes_on).any():
                mask &= ~self._tokens.number_goes_on
            else:
                _only(self._tokens.ends.choose(self._matcher, in_string=False), mask)
        if self._matcher.is_error() or not mask.any():
            raise RunError(f"the constraint of an answer cannot be followed: {_reason(self._matcher)}")

    def accept(self, tokens: Sequence[int]) -> int:
        """Appends tokens as far as they are allowed and foreseen, and returns how many are.

        The first of them is one that `write_mask` allowed. It is refused only where the answer could then not end in
        time.
        """
        for index, token in enumerate(tokens):
            if (index and (self.is_complete or self._number_is_long)) or not self._append(token):
                return index
        return len(tokens)

    def _append(self, token: int) -> bool:
        """Appends a token, or returns False."""
        if self._way and self.is_led and token != self._way[0]:
            return False
        if token in self._tokens.stop_ids:
            self.is_complete = self._matcher.is_accepting()
            return self.is_complete
        if not self._matcher.try_consume_tokens([token]):
            return False
        self._remaining -= 1
        if self._way and self.is_led:
            del self._way[0]
            self.is_complete = not self._way
            return True
        before, way = copy.copy(self._json), self._way
        if self._json is not None:
            self._json.feed(self._tokens.tokenizer.decode_bytes([token]))
        self.is_complete = self._matcher.is_stopped() and self._matcher.is_accepting()
        if self.is_complete or self._look_for_end(way[1:] if way and token == way[0] else None) or not way:
            return True
        self._matcher.rollback(1)
        self._remaining, self._json, self._way, self.is_led = self._remaining + 1, before, way, True
        return False

    def _look_for_end(self, way: list[int] | None = None) -> bool:
        """Looks, where it is time to, how far an end is, and leads the answer there once no other token may be spent.

        Args:
          way: Tokens to an end, if they are known.

        Returns:
          Whether the answer can still end in time, as far as that is known.
        """
        self._way = None
        if self._remaining > self._next_look:
            return True
        if way is None:
            way = self._tokens.ends.find(self._matcher, None if self._json is None else self._json.in_string)
        if way is None or len(way) > self._remaining:
            self._next_look = -1
            return False
        spare = self._remaining - len(way)
        self._way, self.is_led = way, bool(way) and not spare
        self._next_look = self._remaining - (spare // 2 if spare > _NEAR_END else 1)
        return True

    @property
    def _number_is_long(self) -> bool:
        return self._json is not None and self._json.has_long_number


class ConstraintCompiler:
    """Compiles constraints for the tokens of a model. It may be used from several threads.

    Args:
      tokenizer: Tokenizer of the checkpoint.
      stop_ids: Tokens that end an answer.
      vocab_size: Rows of the model's vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int], vocab_size: int):
        self._arguments = tokenizer, stop_ids, vocab_size
        self._tokens: ConstraintTokens | None = None
        self._compiled: collections.OrderedDict[ConstraintConfig, LLMatcher] = collections.OrderedDict()
        self._lock = threading.Lock()

    def compile(self, config: ConstraintConfig) -> "LLMatcher":
        """Returns the grammar of a constraint, which is kept for later answers.

        Raises:
          SettingError: No text of the model's tokens matches it.
        """
        from llguidance import LLMatcher

        with self._lock:
            self._tokens = self._tokens or ConstraintTokens(*self._arguments)
            matcher = self._compiled.pop(config, None) or LLMatcher(
                self._tokens.tokenizer, config.grammar(), log_level=0
            )
            text_tokens = allowed_tokens(matcher, len(self._tokens.stops)) & ~self._tokens.stops
            if not matcher.is_accepting() and not text_tokens.any():
                raise SettingError(*config.given, _reason(matcher))
            self._compiled[config] = matcher
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
            return matcher.deep_copy()

    def constraint(self, config: ConstraintConfig, max_new_tokens: int) -> TokenConstraint | None:
        """Returns the constraint of a new answer; None if it is free."""
        if config.is_free:
            return None
        matcher = self.compile(config)
        assert self._tokens is not None
        return TokenConstraint(matcher, self._tokens, config.json_schema is not None, max_new_tokens)


def allowed_tokens(matcher: "LLMatcher", words: int) -> np.ndarray:
    """Returns the mask of the tokens that may come next, [W] uint32."""
    return np.frombuffer(matcher.compute_bitmask(), np.uint32)[:words]  # the library gives a word more


def _reason(matcher: "LLMatcher") -> str:
    """Returns why no token is allowed."""
    reason = " ".join(matcher.get_error().partition("<state>")[0].split())
    return "no text matches it" if reason in ("", "NoExtensionBias") else reason


def _only(token: int, mask: np.ndarray) -> None:
    """Makes a mask allow one token."""
    mask[:] = 0
    mask[token // 32] = np.uint32(1 << token % 32)
