"""Parses model output. Every function accepts any text without raising."""

import re
import unicodedata

from data_pipelines.synthetic.vocabulary import ALL_NAMES, COLOURS, POSITIONS

_NUMBER = r"-?\d+(?:\.\d+)?"
_BOX = re.compile(rf"\[?\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]?", re.ASCII)
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(?:s|sec|seconds?)?\s*(?:-|–|to)\s*(\d+(?:\.\d+)?)", re.ASCII)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_MAX_COORDINATE = 1000.0
_MAX_CHARACTERS = 2_000  # the rest of a text is ignored
_MAX_SECOND = 1e6


def normalise(text: str) -> str:
    """Returns the text in lower case, without articles, closing punctuation and superfluous white space."""
    text = unicodedata.normalize("NFKC", text[:_MAX_CHARACTERS]).casefold()
    return " ".join(_ARTICLES.sub(" ", text).split()).strip(" .,!?;:")


def parse_boxes(text: str) -> list[list[float]]:
    """Returns all boxes in a text as x0, y0, x1, y1 in thousandths, with x0 <= x1 and y0 <= y1.

    Coordinates written as fractions of 1, which such models produce at times, are converted to thousandths.
    """
    boxes = []
    for match in _BOX.finditer(text[:_MAX_CHARACTERS]):
        numbers = match.groups()
        values = [float(number) for number in numbers]
        if any("." in number for number in numbers) and all(0 <= value <= 1 for value in values):
            values = [value * _MAX_COORDINATE for value in values]
        x0, y0, x1, y1 = (min(max(value, 0.0), _MAX_COORDINATE) for value in values)
        boxes.append([min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)])
    return boxes


def parse_spans(text: str) -> list[tuple[float, float]]:
    """Returns all spans of seconds in a text, such as '3.0-7.0 s' or 'from 3 to 7 seconds'.

    If there are none, all numbers are taken in pairs.
    """
    text = text[:_MAX_CHARACTERS]
    pairs = _SPAN.findall(text)
    if not pairs:
        numbers = re.findall(r"\d+(?:\.\d+)?", text, re.ASCII)
        pairs = list(zip(numbers[::2], numbers[1::2], strict=False))
    spans = [(min(float(start), _MAX_SECOND), min(float(end), _MAX_SECOND)) for start, end in pairs]
    return [(min(span), max(span)) for span in spans]


def parse_attributes(text: str) -> frozenset[str]:
    """Returns the attributes in a caption: each 'name', each 'colour name', and each position as 'at position'."""
    normalised = normalise(text)
    attributes = {f"at {position}" for position in _POSITION.findall(normalised)}
    for colour, name in _PHRASE.findall(normalised):
        attributes |= {name, f"{colour} {name}"} if colour else {name}
    return frozenset(attributes)


def _alternatives(words) -> str:
    return "|".join(re.escape(word.casefold()) for word in sorted(words, key=len, reverse=True))


_PHRASE = re.compile(rf"(?:\b({_alternatives(COLOURS)})\s+)?(?<![\w.-])({_alternatives(ALL_NAMES)})(?!\w|\.\d)")
_POSITION = re.compile(rf"\b(?:at|on|in)\s+({_alternatives(POSITIONS)})\b")
