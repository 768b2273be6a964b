"""CIDEr-D of captions: the n-grams that they share with references, weighted by how rare these are in the whole set."""

import collections
import math
from collections.abc import Sequence

from vl3_jax.evaluation.scorers.meteor import caption_words

_LONGEST = 4  # words of an n-gram
_LENGTH_DEVIATION = 6.0  # words

Vector = dict[tuple[str, ...], float]


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Returns the score of each caption, from 0 to 10; their mean is that of the set.

    Args:
      captions: A caption of each image.
      references: The references of each image, at least one.
    """
    counts = [[_ngrams(text) for text in texts] for texts in references]
    frequencies = collections.Counter(ngram for texts in counts for ngram in {n for text in texts for n in text})
    rarest = math.log(len(captions)) if captions else 0.0
    weights = {ngram: rarest - math.log(frequency) for ngram, frequency in frequencies.items()}

    def weighted(ngrams: collections.Counter) -> list[Vector]:
        vectors: list[Vector] = [{} for _ in range(_LONGEST)]
        for ngram, count in ngrams.items():
            vectors[len(ngram) - 1][ngram] = count * weights.get(ngram, rarest)
        return vectors

    scores = []
    for caption, texts in zip(captions, counts, strict=True):
        ngrams = _ngrams(caption)
        similar = [_similarity(weighted(ngrams), weighted(text), _length(ngrams) - _length(text)) for text in texts]
        scores.append(10 * sum(similar) / len(similar))
    return scores


def _similarity(caption: Sequence[Vector], reference: Sequence[Vector], longer: int) -> float:
    """Returns the mean cosine over the lengths of n-grams, in which none counts more often than the reference has it.

    Args:
      caption: Weights of the n-grams of each length.
      reference: Those of the reference.
      longer: By how many words the caption is longer, which is punished either way.
    """
    cosines = []
    for ours, theirs in zip(caption, reference, strict=True):
        shared = sum(min(weight, theirs[ngram]) * theirs[ngram] for ngram, weight in ours.items() if ngram in theirs)
        lengths = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        cosines.append(shared / lengths if lengths else 0.0)
    return math.exp(-(longer**2) / (2 * _LENGTH_DEVIATION**2)) * sum(cosines) / _LONGEST


def _ngrams(text: str) -> collections.Counter[tuple[str, ...]]:
    words = caption_words(text)
    spans = ((start, start + n) for n in range(1, _LONGEST + 1) for start in range(len(words) - n + 1))
    return collections.Counter(tuple(words[start:end]) for start, end in spans)


def _length(ngrams: collections.Counter[tuple[str, ...]]) -> int:
    """Returns the number of pairs of words, by which the original measures lengths."""
    return sum(count for ngram, count in ngrams.items() if len(ngram) == 2)
