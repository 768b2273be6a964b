"""Resumable jobs that write a folder piece by piece.

A local folder is written as `<name>.converting` and renamed when it is complete; the files by which readers recognise
its content are written last. A job that was killed at any moment is resumed by running the same command again. Under
gs://, where a folder cannot be renamed atomically, it is written directly at its target, in the same order.
"""

import concurrent.futures
import contextlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.storage.journal import Journal
from vl3_jax.storage.paths import check_bucket, is_url, list_dir, resolve, translate_write_errors
from vl3_jax.storage.progress import human_bytes, progress_bar

logger = logging.getLogger(__name__)

WORKERS = max(2, min(4, os.cpu_count() or 2))  # threads that read and write pieces
_PROGRESS_FILE = ".vl3_progress.jsonl"  # journal with the key of each written piece
_COMPLETE_FILE = ".vl3_complete.json"
_STARTED_FILE = ".vl3_started.json"
_STARTING_OVER = "warning: %s holds an unfinished conversion of another source or dtype; starting over"
_OTHER_DATA = "exists already and holds other data; choose another name or remove it"


class Job(contextlib.AbstractContextManager):
    """Resumable job that writes one local folder.

    Attributes:
      folder: Folder to write to while the job runs.
      target: Path of the folder once the job is complete.
      done: Keys of the pieces that an earlier run wrote completely; the caller removes those that are damaged.
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
        self.target = pathlib.Path(os.path.abspath(target))
        self.folder = self.target.with_name(self.target.name + ".converting")
        self.fingerprint, self.done, self._journal = fingerprint, set(), None
        self.finished = _has_fingerprint(self.target / _COMPLETE_FILE, fingerprint)
        if self.finished:
            (self.target / _PROGRESS_FILE).unlink(missing_ok=True)
            logger.info("%s is complete already", self.target)
            return
        if self.target.exists() and not (self.target.is_dir() and not any(self.target.iterdir())):
            raise InputError(f"{self.target}: {_OTHER_DATA}")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _PROGRESS_FILE
        self._journal = Journal(path, tuple, "not a written piece; remove the folder", fingerprint, exclusive=True)
        self.done = set(self._journal.entries)
        if not self._journal.resumed:
            if not self._journal.empty:
                logger.warning(_STARTING_OVER, self.folder)
            for entry in self.folder.iterdir():
                if entry.name != _PROGRESS_FILE:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            self._journal.restart()

    def is_done(self, key: tuple) -> bool:
        """Returns whether an earlier run recorded this piece as written; the caller checks that its files are whole."""
        return key in self.done

    def mark_done(self, key: tuple) -> None:
        """Records a piece as written. Call it only once its bytes are in their files."""
        self._journal.append(key)

    def commit(self) -> None:
        """Renames the complete folder to the target."""
        _write_fingerprint(self.folder / _COMPLETE_FILE, self.fingerprint)
        if self.target.exists():
            self.target.rmdir()  # always empty: `__init__` refuses any other
        os.rename(self.folder, self.target)
        (self.target / _PROGRESS_FILE).unlink()

    def __exit__(self, *_exception) -> None:
        """Releases the folder for other processes; the written pieces stay for the next run."""
        if self._journal:
            self._journal.close()

    def check_space(self, needed: int) -> None:
        """Raises InputError unless the disk of the target has `needed` bytes free."""
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"{self.target}: no space left: {human_bytes(needed)} are needed and {human_bytes(free)} are free; "
                "free some space or choose another disk"
            )


class BucketJob(contextlib.AbstractContextManager):
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
        self.finished, self._resumed = (
            name in names and _has_fingerprint(self.folder / name, fingerprint)
            for name in (_COMPLETE_FILE, _STARTED_FILE)
        )
        if self.finished:
            logger.info("%s is complete already", self.target)
        if self.finished or self._resumed:
            return
        if names and (_COMPLETE_FILE in names or _STARTED_FILE not in names):
            raise InputError(f"{self.target}: {_OTHER_DATA}")
        if names:
            logger.warning(_STARTING_OVER, self.target)
            self.folder.rmtree()
        _write_fingerprint(self.folder / _STARTED_FILE, fingerprint)

    def is_done(self, _key: tuple) -> bool:
        """Returns whether an earlier run may have written this piece; the caller checks its objects."""
        return self._resumed

    def mark_done(self, key: tuple) -> None:
        """Does nothing: the objects themselves show what is written."""

    def check_space(self, needed: int) -> None:
        """Does nothing: a bucket is never full."""

    def commit(self) -> None:
        """Marks the folder as complete."""
        _write_fingerprint(self.folder / _COMPLETE_FILE, self.fingerprint)
        (self.folder / _STARTED_FILE).unlink()

    def __exit__(self, *_exception) -> None:
        """Does nothing: a bucket job holds no lock."""


@contextlib.contextmanager
def open_job(target: str | os.PathLike, fingerprint: str) -> Iterator[Job | BucketJob]:
    """Starts or resumes the job that writes `target`, a local folder or one under gs://.

    Errors of any library about the target, such as a full disk, become an InputError.
    """
    location, kind = (target, BucketJob) if is_url(target) else (os.path.abspath(target), Job)
    with translate_write_errors(location), kind(location, fingerprint) as job:
        yield job


def write_pieces(
    job: Job | BucketJob,
    sizes: Mapping[tuple, int],
    remaining: Collection[tuple],
    write: Callable[[tuple], Any],
    title: str,
    quiet: bool,
) -> None:
    """Writes the remaining pieces of a job in several threads, and records each; the first error stops all.

    Args:
      job: The job.
      sizes: Bytes of all pieces, by key.
      remaining: Keys of the pieces to write.
      write: Writes the piece of a key completely.
      title: Text before the progress bar.
      quiet: Whether to hide the progress bar.
    """
    total = sum(sizes.values())
    done = total - sum(sizes[key] for key in remaining)

    def run(key: tuple) -> None:
        write(key)
        job.mark_done(key)
        bar.update(sizes[key])

    with progress_bar(total, title, done, quiet) as bar, concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(run, remaining))  # an error cancels the pieces that no thread has begun


def _has_fingerprint(file: pathlib.Path, fingerprint: str) -> bool:
    """Returns whether the file exists and holds this fingerprint."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return json.loads(file.read_text())["fingerprint"] == fingerprint
    return False


def _write_fingerprint(file: pathlib.Path, fingerprint: str) -> None:
    file.write_text(json.dumps({"fingerprint": fingerprint}) + "\n")
