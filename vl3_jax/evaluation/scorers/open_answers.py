"""Open questions: MMMU's comparison of key phrases and numbers, and the match of normalised words."""

import ast
import re
from typing import Any

from vl3_jax.evaluation.scorers.letters import DIGIT_WORDS

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
_WORDS = {word: str(digit) for digit, word in enumerate((*DIGIT_WORDS, "ten"))}
_ARTICLES = ("a", "an", "the")


def parse_open(response: str) -> list[str | float]:
    """Returns the strings and numbers that MMMU's rule takes from the response to an open question."""
    keys = _key_phrases(response)
    found = [*keys, *(number for key in keys for pattern in _NUMBERS for number in re.findall(pattern, key))]
    return list(dict.fromkeys(value for text in found for value in _normalised(text)))


def open_matches(parsed: list[str | float], target: Any) -> bool:
    """Returns whether a string of the response contains an accepted string, or a number equals an accepted number."""
    accepted = [value for answer in accepted_answers(target) for value in _normalised(answer)]
    texts = [answer for answer in accepted if isinstance(answer, str)]
    return any(
        any(text in value for text in texts) if isinstance(value, str) else value in accepted for value in parsed
    )


def accepted_answers(target: Any) -> list[str]:
    """Returns the accepted answers of a target: a list, a list stored as text, or one answer."""
    if isinstance(target, str) and target.startswith("[") and target.endswith("]"):
        try:
            target = ast.literal_eval(target)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [str(target)]
    return [str(answer) for answer in target] if isinstance(target, list) else [str(target)]


def words_match(prediction: str, target: str) -> bool:
    """Returns whether the words of a target occur in a prediction side by side.

    Articles are left out, numbers up to ten are digits. A target yes or no must be the first of these two words.
    """
    said, wanted = _words(prediction), _words(target)
    if wanted in (["yes"], ["no"]):
        return next((word for word in said if word in ("yes", "no")), None) == wanted[0]
    starts = range(len(said) - len(wanted) + 1)
    return bool(said) and bool(wanted) and any(said[start : start + len(wanted)] == wanted for start in starts)


def _key_phrases(response: str) -> list[str]:
    response = response.strip().strip(".").lower()
    lines, keys = response.split("\n"), []
    for number, line in enumerate(lines, start=1):
        shortest = ""
        for indicator in (*_INDICATORS, "=") if number == len(lines) else _INDICATORS:
            if indicator in line:
                phrase = line.split(indicator)[-1].strip()
                if not shortest or len(phrase) < len(shortest):
                    shortest = phrase
        if shortest and shortest not in _TRIVIAL:
            keys.append(shortest)
    return keys or [response]


def _normalised(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _words(text: str) -> list[str]:
    words = re.sub(r"[\W_]+", " ", text.lower()).split()
    return [_WORDS.get(word, word) for word in words if word not in _ARTICLES]
