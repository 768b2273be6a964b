"""Resumable jobs that write a checkpoint folder.

A local folder is written as `<name>.converting` and renamed when it is complete; the files by which readers recognise
a checkpoint are written last. A job that was killed at any moment is resumed by running the same command again. Under
gs://, where a folder cannot be renamed atomically, it is written directly at its target, in the same order.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import shutil
import threading
from collections.abc import Iterator

from vl3_jax.checkpoint.paths import check_bucket, is_url, list_dir, resolve, translate_io_errors
from vl3_jax.checkpoint.progress import human_bytes
from vl3_jax.errors import InputError

logger = logging.getLogger(__name__)

_PROGRESS_FILE = ".vl3_progress.jsonl"  # the job's fingerprint, then the key of each written piece, one per line
_COMPLETE_FILE = ".vl3_complete.json"
_STARTED_FILE = ".vl3_started.json"
_STARTING_OVER = "warning: %s holds an unfinished conversion of another source or dtype; starting over"


class Job:
    """Resumable job that writes one local folder.

    Attributes:
      folder: Folder to write to while the job runs.
      target: Path of the folder once the job is complete.
      done: Keys of the pieces that an earlier run wrote completely.
      finished: Whether an earlier run of the same job completed, so that there is nothing to do.
    """

    def __init__(self, target: str | os.PathLike, fingerprint: str):
        """Starts or resumes a job.

        Args:
          target: Local folder to write.
          fingerprint: Identifies the job by its source, dtype and format.

        Raises:
          InputError: `target` exists and is not the result of this job, or another process is writing it.
        """
        if is_url(os.fspath(target)):
            raise InputError(f"{target}: exports go to local folders; choose one and copy it to the bucket")
        self.target = pathlib.Path(os.path.abspath(target))
        self.folder = self.target.with_name(self.target.name + ".converting")
        self.fingerprint, self.done = fingerprint, set()
        self._lock, self._progress = threading.Lock(), None
        self.finished = self._is_finished()
        if not self.finished:
            self._start()

    def _is_finished(self) -> bool:
        if not self.target.exists():
            return False
        with contextlib.suppress(OSError, ValueError, KeyError):
            if json.loads((self.target / _COMPLETE_FILE).read_text())["fingerprint"] == self.fingerprint:
                (self.target / _PROGRESS_FILE).unlink(missing_ok=True)
                return True
        if self.target.is_dir() and not any(self.target.iterdir()):
            return False
        raise InputError(f"{self.target}: exists already and holds other data; choose another name or remove it")

    def _start(self) -> None:
        with translate_write_errors(self.target):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._progress = open(self.folder / _PROGRESS_FILE, "a+")  # noqa: SIM115 (locked until the job is closed)
        try:
            fcntl.flock(self._progress, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"{self.folder}: another process is writing it; wait for it or choose another name"
            ) from None
        self._progress.seek(0)
        text = self._progress.read()
        complete = text[: text.rfind("\n") + 1]  # the last line is incomplete if the process was killed
        lines = complete.splitlines()
        if lines and lines[0] == self.fingerprint:
            self.done = {tuple(json.loads(line)) for line in lines[1:]}
            self._progress.truncate(len(complete.encode()))
            return
        if text:
            logger.warning(_STARTING_OVER, self.folder)
        self._clear()
        self._progress.truncate(0)
        self._progress.write(self.fingerprint + "\n")
        self._progress.flush()

    def _clear(self) -> None:
        for entry in self.folder.iterdir():
            if entry.name == _PROGRESS_FILE:
                continue
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def is_done(self, key: tuple) -> bool:
        """Returns whether an earlier run recorded this piece as written; the caller checks that its files are whole."""
        return key in self.done

    def discard(self, key: tuple) -> None:
        """Forgets a piece that is recorded as written but missing in the folder."""
        self.done.discard(key)

    def mark_done(self, key: tuple) -> None:
        """Records a piece as written. Call it only once its bytes are in their files."""
        with self._lock:
            self._progress.write(json.dumps(key) + "\n")
            self._progress.flush()

    def commit(self) -> None:
        """Renames the complete folder to the target."""
        with translate_write_errors(self.target):
            (self.folder / _COMPLETE_FILE).write_text(json.dumps({"fingerprint": self.fingerprint}) + "\n")
            if self.target.exists():
                self.target.rmdir()  # always empty: `__init__` refuses any other
            os.rename(self.folder, self.target)
            (self.target / _PROGRESS_FILE).unlink()
        self.close()

    def close(self) -> None:
        """Releases the lock on the folder; the written pieces stay for the next run."""
        if self._progress:
            self._progress.close()
            self._progress = None

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_exception) -> None:
        self.close()

    def check_space(self, needed: int) -> None:
        """Raises InputError unless the disk of the target has `needed` bytes free."""
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"{self.target}: no space left: {human_bytes(needed)} are needed and {human_bytes(free)} are free; "
                "free some space or choose another disk"
            )


class BucketJob:
    """Resumable job that writes one folder under gs://; the counterpart of `Job`.

    Objects are created atomically, so no progress file is needed: a piece is done when its objects have their full
    sizes.
    """

    def __init__(self, target: str | os.PathLike, fingerprint: str):
        """Starts or resumes a job.

        Args:
          target: Folder under gs:// to write.
          fingerprint: Identifies the job by its source, dtype and format.

        Raises:
          InputError: `target` holds other data or is not writable, or its bucket does not exist.
        """
        self.target = self.folder = resolve(target)
        self.fingerprint = fingerprint
        check_bucket(self.target)
        names = list_dir(self.folder)
        self.finished = _COMPLETE_FILE in names and self._has_fingerprint(_COMPLETE_FILE)
        self._resumed = _STARTED_FILE in names and self._has_fingerprint(_STARTED_FILE)
        if self.finished or self._resumed:
            return
        if names and (_COMPLETE_FILE in names or _STARTED_FILE not in names):
            raise InputError(f"{self.target}: exists already and holds other data; choose another name or remove it")
        with translate_write_errors(self.target):
            if names:
                logger.warning(_STARTING_OVER, self.target)
                self.folder.rmtree()
            self._write(_STARTED_FILE)

    def _has_fingerprint(self, name: str) -> bool:
        with translate_io_errors(self.target), contextlib.suppress(ValueError, KeyError):
            return json.loads((self.folder / name).read_text())["fingerprint"] == self.fingerprint
        return False

    def _write(self, name: str) -> None:
        (self.folder / name).write_text(json.dumps({"fingerprint": self.fingerprint}) + "\n")

    def is_done(self, _key: tuple) -> bool:
        """Returns whether an earlier run may have written this piece; the caller checks its objects."""
        return self._resumed

    def mark_done(self, key: tuple) -> None:
        """Does nothing: the objects themselves show what is written."""

    def check_space(self, needed: int) -> None:
        """Does nothing: a bucket is never full."""

    def commit(self) -> None:
        """Marks the folder as complete."""
        with translate_write_errors(self.target):
            self._write(_COMPLETE_FILE)
            (self.folder / _STARTED_FILE).unlink()

    def __enter__(self) -> "BucketJob":
        return self

    def __exit__(self, *_exception) -> None:
        """Does nothing: a bucket job holds no lock."""


def open_job(target: str | os.PathLike, fingerprint: str) -> Job | BucketJob:
    """Starts or resumes the job that writes `target`, a local folder or one under gs://."""
    return (BucketJob if is_url(target) else Job)(target, fingerprint)


@contextlib.contextmanager
def translate_write_errors(target: str | os.PathLike) -> Iterator[None]:
    """Translates errors of any library about a full, read-only or forbidden target into an InputError."""
    try:
        with translate_io_errors(target):
            yield
    except InputError:
        raise
    except Exception as error:
        text = str(error)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
            raise InputError(
                f"{target}: no space left on the disk; free some space and run the same command again"
            ) from None
        if isinstance(error, PermissionError) or "Permission denied" in text:
            raise InputError(f"{target}: not allowed to write there; choose another folder") from None
        if getattr(error, "errno", None) == errno.EROFS:
            raise InputError(f"{target}: the disk is read-only; choose another folder") from None
        raise
