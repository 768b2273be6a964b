"""Curves of a run for TensorBoard: event files that are written where they are asked for, without a thread."""

import os
import tempfile
import time
from collections.abc import Mapping

from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.summary import scalar

from vl3_jax.storage.paths import is_url


class Curves:
    """An event file of its own for each start of a run.

    The writer of tensorboardX has a thread, after an error in which, such as a full disk, the run would wait forever.

    Args:
      folder: Folder of the event files, local or under gs://, where files are kept here and copied when they grow.
      done: Steps done before this start; TensorBoard drops later points of earlier files, which are measured again.
    """

    def __init__(self, folder: epath.Path, done: int):
        self._folder = folder
        self._buffer = tempfile.TemporaryDirectory(prefix="vl3-events-") if is_url(folder) else None
        local = self._buffer.name if self._buffer else os.fspath(folder)
        os.makedirs(local, exist_ok=True)
        self._writer = EventsWriter(os.path.join(local, "events"))
        self._write(done, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to the curve of each value."""
        for name, value in values.items():
            self._write(step, summary=scalar(name.replace(" ", "_"), value))
        self._writer.flush()
        self._copy()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()
        self._copy()

    def _write(self, step: int, **content) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))

    def _copy(self) -> None:
        """Copies the event files, as they are now, to the object store."""
        if self._buffer is not None:
            for file in os.scandir(self._buffer.name):
                (self._folder / file.name).write_bytes(epath.Path(file.path).read_bytes())
