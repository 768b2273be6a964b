"""What Orbax and TensorStore print about a failure that they also raise."""

import contextlib
import logging
import sys
from collections.abc import Iterator

from absl import logging as absl_logging

_LOOP_CLOSED = "Event loop is closed"


@contextlib.contextmanager
def raised_errors_only() -> Iterator[None]:
    """Leaves out what the threads of a checkpoint print of a failure, which is hundreds of lines for a full disk.

    The failure itself is raised where the checkpoint is waited for.
    """
    logger, hook = absl_logging.get_absl_logger(), sys.unraisablehook

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != _LOOP_CLOSED:  # writes that were given up end after the loop that began them
            hook(unraisable)

    logger.addFilter(_is_not_raised)
    sys.unraisablehook = report
    try:
        yield
    finally:
        logger.removeFilter(_is_not_raised)
        sys.unraisablehook = hook


def _is_not_raised(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or "orbax" not in record.pathname
