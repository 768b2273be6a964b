"""The standard streams and Ctrl-C, as a command of a shell treats them.

Output that cannot be written (a closed or full stdout) is an error and never silently lost; a reader that leaves, as in
`vl3 ask ... | head -1`, ends the command without a word; characters that stdout cannot encode are escaped.
"""

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator

EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_READER_LEFT = 1, 128 + signal.SIGINT, 128 + signal.SIGPIPE


class OutputError(Exception):
    """Stdout cannot be written; the error of the system is the cause."""


class _Output(io.FileIO):
    """A file whose errors differ from those of all other files."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError from error


def prepare() -> None:
    """Gives the process all three streams, and an stdout and stderr that can write any character."""
    # Python leaves None where a stream is closed. Writing to what is open for reading is an error, as it should be.
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
    if sys.stdout is None:
        sys.stdout = sys.__stdout__ = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if sys.stdout is sys.__stdout__:  # tests and notebooks have a stream of their own
        binary = io.BufferedWriter(_Output(sys.stdout.fileno(), "w", closefd=False))
        sys.stdout = io.TextIOWrapper(binary, sys.stdout.encoding, line_buffering=sys.stdout.isatty())
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def say(line: str) -> None:
    """Writes a line to stderr, if anybody still reads it."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def output_failed(error: OutputError) -> int:
    """Says why stdout cannot be written, unless its reader has left, and returns the exit code."""
    # What is left in the buffer would fail once more when Python ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    cause = error.__cause__
    assert isinstance(cause, OSError)
    if cause.errno == errno.EPIPE:
        return EXIT_READER_LEFT
    say(f"vl3: stdout cannot be written ({cause.strerror}); give it a file with space, a pipe or a terminal")
    return EXIT_FAILURE


@contextlib.contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """Lets Ctrl-C end the process at once, where there is nothing to put away.

    Python would raise KeyboardInterrupt between two of its own instructions: late where a library works for minutes,
    and never where one catches it, as imports may.
    """
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
