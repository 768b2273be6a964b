"""Answers with masks: which objects they name, in which words, and their text without tags."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

from vl3_jax.processing.tokenizer import GROUNDING_TOKENS, MASK, PHRASE_END, PHRASE_START, Tokenizer


@dataclasses.dataclass(frozen=True)
class NamedObject:
    """An object of an answer.

    Attributes:
      phrase: The words that it goes with, None if there are none.
      place: Index of its `[SEG]` among the tokens of the answer.
    """

    phrase: str | None
    place: int


@dataclasses.dataclass(frozen=True)
class GroundedText:
    """An answer.

    Attributes:
      text: Its text with the tags, as it was generated.
      caption: Its text without tags and `[SEG]`, white space collapsed.
      objects: Its objects, in order.
    """

    text: str
    caption: str
    objects: tuple[NamedObject, ...]


def read_grounded(ids: Sequence[int], tokenizer: Tokenizer) -> GroundedText:
    """Reads an answer.

    The objects take the phrases in order; an object in front of all phrases that are left has none. A tag that nothing
    opens or closes is passed over.

    Args:
      ids: The generated ids, with or without the stop token.
      tokenizer: Tokenizer of a model whose answers have masks.
    """
    names = {tokenizer.id_of(name): name for name in GROUNDING_TOKENS}
    stops, objects = set(tokenizer.stop_ids), []
    phrases: collections.deque[str] = collections.deque()
    pieces: list[tuple[str, str]] = []  # text with and without tags
    run: list[int] = []
    opened: int | None = None  # the piece that an open phrase begins with

    def end_run() -> None:
        if run:
            text = tokenizer.decode(run)
            pieces.append((text, text))
            run.clear()

    for place, token in enumerate(ids):
        if token not in names:
            run += [] if token in stops else [token]
            continue
        end_run()
        name = names[token]
        if name == PHRASE_START:
            opened = len(pieces)
        elif name == PHRASE_END and opened is not None:
            phrases.append(_joined(plain for _, plain in pieces[opened:]))
            opened = None
        elif name == MASK:
            objects.append(NamedObject(phrases.popleft() if phrases else None, place))
        pieces.append((name, ""))
    end_run()
    return GroundedText(
        "".join(tagged for tagged, _ in pieces).strip(), _joined(plain for _, plain in pieces), tuple(objects)
    )


def _joined(texts: Iterable[str]) -> str:
    """Joins texts and collapses their white space."""
    return " ".join("".join(texts).split())
