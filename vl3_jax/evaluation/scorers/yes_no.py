"""Yes or no, as MME reads it."""


def anywhere(response: str) -> str:
    """Returns "Yes" if the response contains yes, else "No" if it contains no (as `know` does), else "other"."""
    lowered = response.lower()
    return "Yes" if "yes" in lowered else "No" if "no" in lowered else "other"


def at_start(response: str) -> str:
    """Returns "yes" or "no" if the first four characters contain it, else "other"."""
    start = response.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"
