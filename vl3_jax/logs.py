"""The log lines of the library, shown by the `vl3` command.

Modules log through `logging.getLogger(__name__)`: status at INFO, what may be a mistake at WARNING. The library itself
installs no handler, so a program that imports it shows, silences or redirects the lines as it likes, under the names
`vl3_jax` and `data_pipelines`.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator

PACKAGES = ("vl3_jax", "data_pipelines")


class _Terminal(logging.Handler):
    """Writes lines to stderr, above the progress bars there."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


@contextlib.contextmanager
def on_terminal(level: int = logging.INFO) -> Iterator[None]:
    """Shows the lines of the library on stderr, plain, for as long as the context lasts."""
    handler = _Terminal()
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False  # a handler that another library gave the root would show each line twice
    try:
        yield
    finally:
        for logger, (old_level, old_propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(old_level)
            logger.propagate = old_propagate
