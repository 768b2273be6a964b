"""Worker processes that are started safely and never outlive the process that started them."""

import contextlib
import multiprocessing
import os
import pathlib
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGHUP)  # a terminal sends them to all processes of a command


class StoredFunction:
    """A function that a worker process reads from a file.

    What starts a process writes its arguments into a pipe, and would wait without end for a process that was killed
    before it has read them; so they must fit into the pipe.

    Args:
      function: A function that can be pickled.
      folder: Folder for the file, which must exist until the workers have called the function once.
    """

    def __init__(self, function: Callable, folder: str | os.PathLike):
        self._file, self._function = pathlib.Path(folder, "function.pickle"), None
        self._file.write_bytes(pickle.dumps(function))

    def __call__(self, *arguments: Any) -> Any:
        if self._function is None:
            self._function = pickle.loads(self._file.read_bytes())
        return self._function(*arguments)


@contextlib.contextmanager
def stored(function: Callable) -> Iterator[StoredFunction]:
    """Stores a function for worker processes for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="vl3-workers-") as folder:
        yield StoredFunction(function, folder)


@contextlib.contextmanager
def without_terminal_signals() -> Iterator[None]:
    """Lets the processes that are started here never see Ctrl-C or the end of the terminal: their parent ends them.

    The parent still gets these signals, through its other threads or when the context ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Ends this worker process as soon as the process that started it has ended, however that was."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()
