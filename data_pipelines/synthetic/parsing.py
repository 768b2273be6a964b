"""Reads what a model wrote, whatever it wrote: no text raises."""

import re
import unicodedata

from data_pipelines.synthetic.vocabulary import ALL_NAMES, COLOURS, POSITIONS

_NUMBER = r"-?\d+(?:\.\d+)?"
_FOUR = re.compile(rf"\[?\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]?", re.ASCII)
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(?:s|sec|seconds?)?\s*(?:-|–|to)\s*(\d+(?:\.\d+)?)", re.ASCII)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_LARGEST = 1000.0
_LONGEST = 2_000  # characters that are looked at
_LAST_SECOND = 1e6


def normalise(text: str) -> str:
    """Lower case, without articles, marks at the end and superfluous blanks."""
    text = unicodedata.normalize("NFKC", text[:_LONGEST]).casefold()
    return " ".join(_ARTICLES.sub(" ", text).split()).strip(" .,!?;:")


def parse_boxes(text: str) -> list[list[float]]:
    """All boxes in it as x0, y0, x1, y1 in thousandths, corners in order.

    Fractions of 1, which such models are known to write at times, are taken for what they mean.
    """
    found = []
    for match in _FOUR.finditer(text[:_LONGEST]):
        written = match.groups()
        values = [float(value) for value in written]
        if any("." in value for value in written) and all(0 <= value <= 1 for value in values):
            values = [value * _LARGEST for value in values]
        x0, y0, x1, y1 = (min(max(value, 0.0), _LARGEST) for value in values)
        found.append([min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)])
    return found


def parse_spans(text: str) -> list[tuple[float, float]]:
    """All spans of seconds: '3.0-7.0 s', 'from 3 to 7 seconds'; without any such, all numbers taken in pairs."""
    text = text[:_LONGEST]
    pairs = _SPAN.findall(text)
    if not pairs:
        numbers = re.findall(r"\d+(?:\.\d+)?", text, re.ASCII)
        pairs = list(zip(numbers[::2], numbers[1::2], strict=False))
    spans = [(min(float(start), _LAST_SECOND), min(float(end), _LAST_SECOND)) for start, end in pairs]
    return [(min(span), max(span)) for span in spans]


def parse_attributes(text: str) -> frozenset[str]:
    """What a caption says: each 'name', each 'colour name', and the place as 'at place'."""
    words = normalise(text)
    found = set()
    for colour, name in _PHRASE.findall(words):
        found.add(name)
        if colour:
            found.add(f"{colour} {name}")
    for preposition_and_place in _PLACE.findall(words):
        found.add(f"at {preposition_and_place}")
    return frozenset(found)


def _alternatives(words) -> str:
    return "|".join(re.escape(word.casefold()) for word in sorted(words, key=len, reverse=True))


_PHRASE = re.compile(rf"(?:\b({_alternatives(COLOURS)})\s+)?(?<![\w.-])({_alternatives(ALL_NAMES)})(?!\w|\.\d)")
_PLACE = re.compile(rf"\b(?:at|on|in)\s+({_alternatives(POSITIONS)})\b")
