"""How alike two phrases are: by a model of the caller that embeds them, or offline by the lemmas of their words."""

import re
from collections.abc import Callable, Sequence

import numpy as np

# Phrases and the similarity of each of the first with each of the second, from -1 or 0 to 1.
PhraseSimilarity = Callable[[Sequence[str], Sequence[str]], np.ndarray]

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)?")
_LITTLE = frozenset(
    (
        "a",
        "an",
        "the",
        "this",
        "that",
        "these",
        "those",
        "his",
        "her",
        "its",
        "their",
        "my",
        "our",
        "your",
        "of",
        "in",
        "on",
        "at",
        "to",
        "with",
        "and",
        "or",
        "is",
        "are",
    )
)
_IRREGULAR = {
    "men": "man",
    "women": "woman",
    "people": "person",
    "children": "child",
    "feet": "foot",
    "teeth": "tooth",
    "mice": "mouse",
    "geese": "goose",
    "leaves": "leaf",
    "knives": "knife",
    "shelves": "shelf",
}
_KEPT = ("ss", "us", "is")  # endings of words in the singular


def lemma_similarity(first: Sequence[str], second: Sequence[str]) -> np.ndarray:
    """Compares phrases by the lemmas that they share, without a model.

    Plurals and possessives of English are reduced by rule, and articles and the like left out. The similarity is the
    number of shared lemmas over the geometric mean of both numbers: the cosine of the sets.

    Args:
      first: Phrases.
      second: Phrases.

    Returns:
      [first, second] float64, from 0 to 1.
    """
    sets = [[_lemmas(phrase) for phrase in phrases] for phrases in (first, second)]
    values = [[len(a & b) / np.sqrt(len(a) * len(b)) if a and b else float(a == b) for b in sets[1]] for a in sets[0]]
    return np.reshape(np.asarray(values, np.float64), (len(first), len(second)))


def embedding_similarity(embed: Callable[[Sequence[str]], np.ndarray]) -> PhraseSimilarity:
    """Returns the comparison by the cosine of embeddings, such as the mean over the tokens of BERT's last layer.

    Args:
      embed: Takes phrases and returns a vector of each, [phrases, width].
    """

    def similarity(first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        if not first or not second:
            return np.zeros((len(first), len(second)))
        vectors = [np.asarray(embed(list(phrases)), np.float64) for phrases in (first, second)]
        lengths = [np.linalg.norm(each, axis=1, keepdims=True) for each in vectors]
        left, right = (each / np.where(length > 0, length, 1) for each, length in zip(vectors, lengths, strict=True))
        return left @ right.T

    return similarity


def _lemmas(phrase: str) -> frozenset[str]:
    words = (re.sub(r"['\u2019].*", "", word) for word in _WORD.findall(phrase.lower()))
    return frozenset(_lemma(word) for word in words if word not in _LITTLE)


def _lemma(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) < 4 or not word.endswith("s") or word.endswith(_KEPT):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-2] if word.endswith(("ches", "shes", "xes", "sses", "zes")) else word[:-1]
