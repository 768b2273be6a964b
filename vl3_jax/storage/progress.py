"""Progress bars in bytes."""

import sys

from tqdm import tqdm


def progress_bar(total: int, title: str, done: int = 0, quiet: bool = False) -> tqdm:
    """Creates a progress bar on stderr that may be updated from several threads.

    The bar is refreshed every 0.5 s on a terminal and every 10 s elsewhere, such as in a log file.

    Args:
      total: Number of bytes of the job.
      title: Text before the bar.
      done: Number of bytes done by an earlier run.
      quiet: Whether to hide the bar.
    """
    return tqdm(
        total=total,
        initial=done,
        desc=title,
        unit="B",
        unit_scale=True,
        disable=quiet,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
    )


def human_bytes(count: float) -> str:
    """Formats a number of bytes with a decimal prefix: `3919987168` as `3.92 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
