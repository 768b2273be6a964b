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
import threading
from collections.abc import Iterator
from typing import Any

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
        raw, unbuffered = _Output(sys.stdout.fileno(), "w", closefd=False), sys.stdout.write_through
        binary: Any = raw if unbuffered else io.BufferedWriter(raw)
        lines = sys.stdout.line_buffering
        sys.stdout = io.TextIOWrapper(binary, sys.stdout.encoding, line_buffering=lines, write_through=unbuffered)
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


def _end(_number: int, _frame: Any) -> None:
    """Stands for Ctrl-C that ends the process, which a thread does: at once, whatever the main thread is doing."""


@contextlib.contextmanager
def ended_by_interrupt(command: str) -> Iterator[None]:
    """Lets Ctrl-C end the process at once, with one line and exit code 130.

    Python would raise KeyboardInterrupt between two of its own instructions: late where a library works for minutes,
    never where one catches it, and as another error where one is being imported. A handler that is installed meanwhile
    takes the place of this one.
    """
    handler = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if handler is not signal.default_int_handler or not in_main_thread:  # ignored, as by nohup, or somebody else's
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, _end)
    watcher = threading.Thread(target=_watch, args=(reader, command), name="ctrl-c", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.set_wakeup_fd(before)
        os.close(writer)
        watcher.join()


def _watch(reader: int, command: str) -> None:
    """Ends the process when the number of Ctrl-C comes through the pipe, unless another handler is in place."""
    with open(reader, "rb", buffering=0) as pipe:
        while numbers := pipe.read(64):
            if signal.SIGINT in numbers and signal.getsignal(signal.SIGINT) is _end:
                with contextlib.suppress(OSError):
                    os.write(2, f"{command}: stopped\n".encode())
                paths = sys.modules.get("vl3_jax.storage.paths")
                if paths is not None:
                    paths.remove_temporary_folders()
                os._exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def raising_interrupts() -> Iterator[None]:
    """Lets Ctrl-C raise KeyboardInterrupt, for what can be stopped without ending the process."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not _end:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
