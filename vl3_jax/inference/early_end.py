"""The short way to the end of a constrained answer, for when its tokens run out."""

import collections
import string
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_LONGEST = 1024  # tokens of a way to the end
_LONGEST_INTEGER, _LONGEST_FRACTION = 20, 15  # characters
_QUOTE, _BACKSLASH, _NUMBER = b'"'[0], b"\\"[0], frozenset(b"0123456789+-.eE")
# What ends something comes first; what opens something, last.
_ENDS = "]},:"
_DIGITS = "1234567890"  # zeros may be without end
_IN_JSON = _ENDS + '"' + _DIGITS + "-ntf [{"
_IN_STRING = '"' + _DIGITS + string.ascii_letters + string.punctuation + " "
_IN_TEXT = string.punctuation + _DIGITS + string.ascii_letters + " \n"


class JsonText:
    """Follows JSON text byte by byte.

    Attributes:
      in_string: Whether the end of the text is within a string.
    """

    def __init__(self, in_string: bool = False):
        self.in_string, self._number, self._escaped = in_string, b"", False

    @property
    def has_long_number(self) -> bool:
        """Whether the text ends with a number of more digits than a person or a float has a use for."""
        return len(self._number) >= (_LONGEST_FRACTION if b"." in self._number else _LONGEST_INTEGER)

    def feed(self, content: bytes) -> None:
        """Appends a part of the text."""
        for byte in content:
            if self.in_string:
                self.in_string = byte != _QUOTE or self._escaped
                self._escaped = byte == _BACKSLASH and not self._escaped
            else:
                self.in_string = byte == _QUOTE
                self._number = self._number + bytes([byte]) if byte in _NUMBER else b""


class EndFinder:
    """Finds short ways to the end of answers.

    Args:
      tokenizer: The tokens of the model.
    """

    def __init__(self, tokenizer: "LLTokenizer"):
        self._tokenizer = tokenizer
        single = {character: tokenizer.tokenize_str(character) for character in string.printable}
        self._ids = {character: ids[0] for character, ids in single.items() if len(ids) == 1}

    def find(self, matcher: "LLMatcher", in_string: bool | None) -> list[int] | None:
        """Returns tokens after which an answer matches: what is forced, and else what ends something.

        Args:
          matcher: The answer so far, which stays as it is.
          in_string: Whether its end is within a string of JSON; None if it is no JSON.

        Returns:
          The tokens, not always the fewest; None if no end is found.
        """
        matcher, way = matcher.deep_copy(), []
        text, used = None if in_string is None else JsonText(in_string), collections.Counter()
        while not matcher.is_accepting():
            forced = matcher.compute_ff_bytes()
            if forced:
                tokens = self._tokenizer.tokenize_bytes(forced)
            else:
                tokens = [self.choose(matcher, None if text is None else text.in_string, used)]
                used.update(tokens)
            taken = matcher.try_consume_tokens(tokens)
            if not taken or len(way) > _LONGEST:
                return None
            way += tokens[:taken]
            if text is not None:
                text.feed(self._tokenizer.decode_bytes(tokens[:taken]))
        return way

    def choose(
        self, matcher: "LLMatcher", in_string: bool | None, used: Mapping[int, int] = MappingProxyType({})
    ) -> int:
        """Returns the allowed token that ends most; of those that end nothing, one that was used least.

        Args:
          matcher: The answer so far.
          in_string: As of `find`.
          used: How often tokens were chosen.
        """
        allowed = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        order = _IN_TEXT if in_string is None else _IN_STRING if in_string else _IN_JSON
        ends = "" if in_string is None else '"' if in_string else _ENDS
        ids = {self._ids[character]: character for character in order if character in self._ids}
        ids = {token: character for token, character in ids.items() if allowed[token // 8] >> (token % 8) & 1}
        if not ids:
            return int(np.unpackbits(allowed, bitorder="little").argmax())
        return min(ids, key=lambda token: 0 if ids[token] in ends else used.get(token, 0))
