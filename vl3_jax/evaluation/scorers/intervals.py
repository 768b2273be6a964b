"""Time intervals in a response, and their intersection over union with a reference."""

import math
import re
from collections.abc import Sequence

from vl3_jax.evaluation.scorers.unparsed import UnparsedError

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_INTERVAL = re.compile(rf"{_NUMBER}\s*(?:-|to)\s*{_NUMBER}")

Interval = tuple[float, float]


def find_intervals(response: str) -> list[Interval]:
    """Returns the intervals of a response: `2.0 to 8.5`, `3 - 9`, else its numbers in pairs without an odd first."""
    pairs = _INTERVAL.findall(response)
    if not pairs:
        numbers = re.findall(_NUMBER, response)
        numbers = numbers[len(numbers) % 2 :]
        pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
    return [(float(start), float(end)) for start, end in pairs]


def temporal_iou(intervals: Sequence[Sequence[float]], target: Sequence[float], merge: bool) -> float:
    """Returns the intersection over union of intervals with one target interval.

    Args:
      intervals: Predicted intervals; their ends may be in either order.
      target: Start and end.
      merge: Whether overlapping intervals count once. Otherwise the value can exceed 1.

    Raises:
      UnparsedError: The union is empty, and `merge` is False.
    """
    start, end = sorted(map(float, target))
    spans = sorted((min(span), max(span)) for span in intervals)
    spans = _merged(spans) if merge else spans
    inter = sum(max(0.0, min(end, right) - max(start, left)) for left, right in spans)
    union = end - start + sum(right - left for left, right in spans) - inter
    if union == 0 and not merge:
        raise UnparsedError("ZeroDivisionError")
    return inter / union if union and math.isfinite(union) else 0.0


def _merged(spans: Sequence[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for left, right in spans:
        if merged and left <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], right))
        else:
            merged.append((left, right))
    return merged
