"""The text of an answer while its tokens arrive: pieces of whole characters, up to a stop string."""

from collections.abc import Iterator, Sequence

from vl3_jax.processing.tokenizer import Tokenizer


class AnswerText:
    """Collects the text of an answer.

    Args:
      tokenizer: Tokenizer of the checkpoint.
      stops: Texts that end the answer, which does not contain them.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._stops = stops
        self._new: list[int] | None = []
        self._pieces = tokenizer.stream(iter(lambda: self._new, None))
        self._text = ""  # all that is decoded
        self._taken = 0
        self._found = self._ended = False

    def add(self, token: int) -> bool:
        """Appends a token, which is no stop token, and returns whether a stop string is found."""
        self._new = [token]
        self._extend(next(self._pieces))
        return self._found

    def end(self) -> None:
        """Says that there are no more tokens. Nothing happens the second time."""
        if not self._ended:
            self._ended, self._new = True, None
            self._extend("".join(self._pieces))

    def take(self) -> Iterator[str]:
        """Yields the text that is new since the last call, if any; what may begin a stop string waits."""
        ready = len(self._text) if self._ended or self._found else len(self._text) - self._held_back()
        if ready > self._taken:
            piece = self._text[self._taken : ready]
            self._taken = ready
            yield piece

    @property
    def whole(self) -> str:
        """The text so far."""
        return self._text

    def _extend(self, piece: str) -> None:
        if self._found:
            return
        before = len(self._text)
        self._text += piece
        starts = [self._text.find(stop, max(before - len(stop) + 1, 0)) for stop in self._stops]
        starts = [start for start in starts if start >= 0]
        if starts:
            self._text, self._found = self._text[: min(starts)], True

    def _held_back(self) -> int:
        """Returns the length of the longest end of the text with which a stop string begins."""
        longest = max(map(len, self._stops), default=0)
        ends = range(min(longest - 1, len(self._text)), 0, -1)
        return next((end for end in ends if any(stop.startswith(self._text[-end:]) for stop in self._stops)), 0)
