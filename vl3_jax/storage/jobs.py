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
from vl3_jax.storage.disk_space import check_space, translate_write_errors
from vl3_jax.storage.durable import rename
from vl3_jax.storage.journal import Journal
from vl3_jax.storage.locks import LOCK, hold
from vl3_jax.storage.paths import check_bucket, is_url, list_dir, resolve
from vl3_jax.storage.progress import progress_bar

logger = logging.getLogger(__name__)

MOST_WORKERS = 4
WORKERS = max(2, min(MOST_WORKERS, os.cpu_count() or 2))  # threads that read and write pieces
_PROGRESS_FILE = ".vl3_progress.jsonl"  # journal with the key of each written piece
_COMPLETE_FILE = ".vl3_complete.json"
_STARTED_FILE = ".vl3_started.json"
_STARTING_OVER = "warning: %s holds an unfinished conversion of another source or dtype; starting over"
_OTHER_DATA = "exists already and holds other data; choose another name or remove it"
_LINK = "is a link; give the path of a folder itself"


class Job(contextlib.AbstractContextManager):
    """Resumable job that writes one local folder.

    Attributes:
      folder: Folder to write to while the job runs.
      target: Path of the folder once the job is complete.
      finished: Whether an earlier run of the same job completed, so that there is nothing to do.
    """

    def __init__(self, target: str | os.PathLike, fingerprint: str, names: Collection[str]):
        """Starts or resumes a job.

        Args:
          target: Local folder to write.
          fingerprint: Identifies the job by its source, dtype and format.
          names: Names of the entries of the folder that the job may make. A job that starts over removes those of the
            unfinished one, and nothing else.

        Raises:
          InputError: `target` exists and is not the result of this job, or another process is writing it.
        """
        self.target = pathlib.Path(os.path.abspath(target))
        self.fingerprint, self._done, self._journal = fingerprint, {}, None
        self._opened = contextlib.ExitStack()
        if self._is_finished():
            return
        if self.target.is_symlink():
            raise InputError(f"{self.target}: {_LINK}")
        if self.target.exists() and not (self.target.is_dir() and not any(self.target.iterdir())):
            raise InputError(f"{self.target}: {_OTHER_DATA}")
        self.folder = self.target.with_name(self.target.name + ".converting")
        if self.folder.is_symlink():
            raise InputError(f"{self.folder}: {_LINK}")
        with contextlib.ExitStack() as stack:
            stack.enter_context(hold(self.folder))
            if self._is_finished():  # by a job that this one has met at its end
                return
            self._resume(fingerprint, names, stack)
            self._opened = stack.pop_all()

    def _is_finished(self) -> bool:
        """Looks whether there is nothing to do."""
        self.finished = _has_fingerprint(self.target / _COMPLETE_FILE, self.fingerprint)
        if self.finished:
            for name in (_PROGRESS_FILE, LOCK):
                (self.target / name).unlink(missing_ok=True)
            logger.info("%s is complete already", self.target)
        return self.finished

    def _resume(self, fingerprint: str, names: Collection[str], stack: contextlib.ExitStack) -> None:
        """Reads what an earlier run has done, or removes what is of another job."""
        path = self.folder / _PROGRESS_FILE
        others = any(entry.name != LOCK for entry in self.folder.iterdir())
        if others and (path.is_symlink() or not path.is_file()):
            raise InputError(f"{self.folder}: {_OTHER_DATA}")
        self._journal = Journal(path, _parse_entry, "not a written piece; remove the folder", fingerprint)
        stack.callback(self._journal.close)
        self._done = dict(self._journal.entries)
        if not self._journal.resumed:
            self._start_over(path)
            self._journal.restart()
            self._journal.append([[], sorted(names)])

    def _start_over(self, progress_file: pathlib.Path) -> None:
        """Removes what the unfinished job has made whose progress file is in the folder."""
        if not self._journal.empty:
            logger.warning(_STARTING_OVER, self.folder)
        made = [*_made_names(progress_file), _COMPLETE_FILE]
        entries = [entry for entry in self.folder.iterdir() if entry.name not in (_PROGRESS_FILE, LOCK)]
        if foreign := sorted(entry.name for entry in entries if entry.name not in made or entry.is_symlink()):
            raise InputError(
                f"{self.folder}: besides an unfinished conversion it holds {', '.join(foreign[:8])}; move what you "
                "need and remove the folder, or choose another name"
            )
        for entry in entries:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def is_done(self, key: tuple) -> bool:
        """Returns whether an earlier run recorded this piece as written; the caller checks that its files are whole."""
        return key in self._done

    def note(self, key: tuple) -> Any:
        """Returns what was recorded with a written piece, by this run or an earlier one; None if nothing was."""
        return self._done.get(key)

    def mark_done(self, key: tuple, note: Any = None) -> None:
        """Records a piece as written. Call it only once its bytes are in their files."""
        self._journal.append([key, note])
        self._done[key] = note

    def forget(self, keys: Collection[tuple]) -> None:
        """Takes pieces as not written, whose files are damaged."""
        for key in keys:
            self._done.pop(key, None)

    def commit(self) -> None:
        """Renames the complete folder to the target."""
        _write_fingerprint(self.folder / _COMPLETE_FILE, self.fingerprint)
        if self.target.exists():
            self.target.rmdir()  # always empty: `__init__` refuses any other
        rename(self.folder, self.target)
        for name in (_PROGRESS_FILE, LOCK):
            (self.target / name).unlink(missing_ok=True)

    def __exit__(self, *_exception) -> None:
        """Releases the folder for other processes; the written pieces stay for the next run."""
        self._opened.close()

    def check_space(self, needed: int) -> None:
        """Raises InputError unless the disk of the target has `needed` bytes free."""
        check_space(self.target, needed, advice="or choose another disk")


class BucketJob(contextlib.AbstractContextManager):
    """Resumable job that writes one folder under gs://; the counterpart of `Job`.

    Objects are created atomically, so no progress file is needed: a piece is done when its objects have their full
    sizes.
    """

    def __init__(self, target: str | os.PathLike, fingerprint: str, names: Collection[str]):
        """Starts or resumes a job.

        Args:
          target: Folder under gs:// to write.
          fingerprint: Identifies the job by its source, dtype and format.
          names: Names of the entries of the folder that the job may make.

        Raises:
          InputError: `target` holds other data or is not writable, its bucket does not exist, or another process is
            writing it.
        """
        self.target = self.folder = resolve(target)
        self.fingerprint = fingerprint
        check_bucket(self.target)
        self._opened, self._notes = contextlib.ExitStack(), {}
        with contextlib.ExitStack() as stack:
            self._lock = stack.enter_context(hold(self.folder))
            self._resume(fingerprint, names)
            self._opened = stack.pop_all()

    def _resume(self, fingerprint: str, names: Collection[str]) -> None:
        """Looks what an earlier run has done, or removes what is of another job."""
        entries = list_dir(self.folder)
        entries.pop(LOCK, None)
        self.finished, self._resumed = (
            name in entries and _has_fingerprint(self.folder / name, fingerprint)
            for name in (_COMPLETE_FILE, _STARTED_FILE)
        )
        if self.finished:
            logger.info("%s is complete already", self.target)
        if self.finished or self._resumed:
            return
        if entries and (_STARTED_FILE not in entries or set(entries) - {_STARTED_FILE, *names}):
            raise InputError(f"{self.target}: {_OTHER_DATA}")
        if entries:
            logger.warning(_STARTING_OVER, self.target)
            for entry in map(self.folder.joinpath, entries):
                entry.rmtree() if entry.is_dir() else entry.unlink()
        _write_fingerprint(self.folder / _STARTED_FILE, fingerprint)

    def is_done(self, _key: tuple) -> bool:
        """Returns whether an earlier run may have written this piece; the caller checks its objects."""
        return self._resumed

    def note(self, key: tuple) -> Any:
        """Returns what this run recorded with a written piece; None if nothing was."""
        return self._notes.get(key)

    def mark_done(self, key: tuple, note: Any = None) -> None:
        """Keeps the note of a piece; the objects themselves show what is written."""
        self._lock.check()
        self._notes[key] = note

    def check_space(self, needed: int) -> None:
        """Does nothing: a bucket is never full."""

    def commit(self) -> None:
        """Marks the folder as complete."""
        self._lock.check()
        _write_fingerprint(self.folder / _COMPLETE_FILE, self.fingerprint)
        (self.folder / _STARTED_FILE).unlink()

    def __exit__(self, *_exception) -> None:
        """Releases the folder for other processes."""
        self._opened.close()


@contextlib.contextmanager
def open_job(target: str | os.PathLike, fingerprint: str, names: Collection[str]) -> Iterator[Job | BucketJob]:
    """Starts or resumes the job that writes the entries `names` of `target`, a local folder or one under gs://.

    Errors of any library about the target, such as a full disk, become an InputError.
    """
    location, kind = (target, BucketJob) if is_url(target) else (os.path.abspath(target), Job)
    with translate_write_errors(location), kind(location, fingerprint, names) as job:
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
      write: Writes the piece of a key completely, and returns a JSON value to record with it.
      title: Text before the progress bar.
      quiet: Whether to hide the progress bar.
    """
    total = sum(sizes.values())
    done = total - sum(sizes[key] for key in remaining)

    def run(key: tuple) -> None:
        job.mark_done(key, write(key))
        bar.update(sizes[key])

    with progress_bar(total, title, done, quiet) as bar, concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(run, remaining))  # an error cancels the pieces that no thread has begun


def _parse_entry(value: Any) -> tuple[tuple, Any]:
    """Returns the key and the note of a written piece; raises TypeError or ValueError for anything else."""
    key, note = value
    hash(tuple(key))
    return tuple(key), note


def _made_names(progress_file: pathlib.Path) -> list[str]:
    """Returns the names of the entries that the job of a progress file may have made; its second line lists them."""
    with contextlib.suppress(ValueError, IndexError, TypeError):
        key, names = json.loads(progress_file.read_bytes().splitlines()[1])
        if not key and all(isinstance(name, str) for name in names):
            return names
    return []


def _has_fingerprint(file: pathlib.Path, fingerprint: str) -> bool:
    """Returns whether the file exists and holds this fingerprint."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return json.loads(file.read_bytes())["fingerprint"] == fingerprint
    return False


def _write_fingerprint(file: pathlib.Path, fingerprint: str) -> None:
    file.write_text(json.dumps({"fingerprint": fingerprint}) + "\n")
