"""Relaxed accuracy of ChartQA: numbers may differ by 5 %, texts only in case."""

_TOLERANCE = 0.05


def to_number(text: str) -> float | None:
    """Returns the number of a text, where a percent sign at the end divides by 100; None if it is no number."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_match(prediction: str, target: str, allow_factor_100: bool) -> bool | None:
    """Returns whether two numbers are close enough; None if they cannot be compared as numbers.

    Args:
      prediction: Response of the model.
      target: Accepted answer; 0 is not compared as a number.
      allow_factor_100: Whether one number may be the other in percent.
    """
    number, wanted = to_number(prediction), to_number(target)
    if number is None or not wanted:
        return None
    pairs = [(number, wanted)]
    if allow_factor_100:
        pairs += [(number, wanted / 100), (number / 100, wanted)]
    return any(base and abs(value - base) / abs(base) <= _TOLERANCE for value, base in pairs)
