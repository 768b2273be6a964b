"""METEOR of captions, as NLTK computes it: words match exactly, by their stem, and as synonyms of WordNet."""

import functools
import importlib
import logging
import re
from collections.abc import Sequence
from typing import Any

from vl3_jax.errors import InputError

logger = logging.getLogger(__name__)

STAGES = ("exact", "stem", "synonym")
NOT_AVAILABLE = "METEOR (not available)"
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_NO_WORDNET = "WordNet is not installed; run `python -m nltk.downloader wordnet`"


class Meteor:
    """METEOR with the stages that this machine has.

    Attributes:
      stages: Those of `STAGES` that are used.
      name: "METEOR", with its stages behind it if one is missing: values of different stages do not compare.
    """

    def __init__(self, stages: Sequence[str] | None = None):
        """Prepares the stages.

        Args:
          stages: Those of `STAGES` to use, in order; None is all that are available.

        Raises:
          InputError: NLTK is not installed, or the WordNet of the synonyms that are asked for.
        """
        wordnet = _wordnet()
        self.stages = tuple(stages or STAGES[: 2 if wordnet is None else 3])
        if self.stages != STAGES[: len(self.stages)]:
            raise ValueError(f"stages {self.stages}; expected the first of {STAGES}")
        if "synonym" in self.stages and wordnet is None:
            raise InputError(f"METEOR's synonyms are not available: {_NO_WORDNET}")
        self._synonyms = wordnet if "synonym" in self.stages else _Nothing()
        self._stemmer = _nltk("nltk.stem.porter").PorterStemmer() if "stem" in self.stages else _Nothing()
        self.name = "METEOR" if self.stages == STAGES else f"METEOR ({', '.join(self.stages)})"

    def score(self, caption: str, references: Sequence[str]) -> float:
        """Returns the score of a caption, without its punctuation, against the closest reference; from 0 to 1."""
        words, wanted = caption_words(caption), [caption_words(reference) for reference in references]
        if not words or not any(wanted):
            return 0.0
        score = _nltk("nltk.translate.meteor_score").meteor_score
        return float(score(wanted, words, stemmer=self._stemmer, wordnet=self._synonyms))


def caption_words(text: str) -> list[str]:
    """Returns the words of a caption in lower case, without punctuation."""
    return _WORD.findall(text.lower())


@functools.cache
def available_meteor() -> Meteor | None:
    """Returns METEOR with the stages that this machine has, or None without NLTK; a warning says what is missing."""
    try:
        return Meteor()
    except InputError as error:
        logger.warning("%s", error)
        return None


class _Nothing:
    """A stemmer that changes no word, and a WordNet that has none."""

    def stem(self, word: str) -> str:
        return word

    def synsets(self, word: str) -> list[Any]:
        return []


def _nltk(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError("METEOR is not available: NLTK is not installed; run `pip install nltk`") from None


@functools.cache
def _wordnet() -> Any:
    """Returns NLTK's WordNet, or None, with a warning, if its data is not on this machine."""
    wordnet = _nltk("nltk.corpus").wordnet
    try:
        wordnet.synsets("word")
    except LookupError:
        logger.warning("METEOR goes without synonyms: %s", _NO_WORDNET)
        return None
    return wordnet
