"""Edit distance, and the average normalised Levenshtein similarity (ANLS) that is made of it."""

from collections.abc import Sequence


def levenshtein(first: str, second: str) -> int:
    """Returns the number of insertions, deletions and replacements that turn one text into the other."""
    if len(first) < len(second):
        first, second = second, first
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.0) -> float:
    """Returns the similarity to the closest answer, from 0 to 1.

    Args:
      prediction: Response of the model.
      answers: Accepted answers.
      threshold: A similarity below it is 0.
    """
    similarity = 1 - min((_relative_distance(answer, prediction) for answer in answers), default=1.0)
    return similarity if similarity >= threshold else 0.0


def _relative_distance(answer: str, prediction: str) -> float:
    # The distance is that of the normalised texts, the length that of the raw ones.
    length = max(len(answer.upper()), len(prediction.upper()))
    if not length:
        return 0.0
    return levenshtein(" ".join(answer.lower().split()), " ".join(prediction.lower().split())) / length
