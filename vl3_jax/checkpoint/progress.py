"""The progress bar of long jobs: bytes done, on stderr, quiet when nobody watches a terminal closely."""

import sys

from tqdm import tqdm


def progress_bar(total: int, title: str, done: int = 0, quiet: bool = False) -> tqdm:
    """A bar over `total` bytes that starts at `done`; safe to update from several threads."""
    return tqdm(
        total=total,
        initial=done,
        desc=title,
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        disable=quiet,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    )


def note(message: str) -> None:
    """One line to stderr."""
    print(message, file=sys.stderr, flush=True)


def human_bytes(count: float) -> str:
    """`3919987168` -> `3.92 GB` (powers of ten, as disk space is sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
