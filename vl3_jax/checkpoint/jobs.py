"""Jobs that write a folder: built beside its place, resumed from a record, moved there in one rename.

A folder under construction is `<name>.converting` and never looks complete: what a reader needs to recognise it is
written last. Killing the job at any moment and running the same command again continues it. Under gs://, where nothing
can be renamed at once, the folder is built in its place, in the same order.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Iterator

from vl3_jax.checkpoint.paths import check_bucket, is_url, list_dir, resolve, translate_io_errors
from vl3_jax.checkpoint.progress import human_bytes, note
from vl3_jax.errors import InputError

_RECORD = ".vl3_record.jsonl"
_STAMP = ".vl3_complete.json"
_BEGUN = ".vl3_begun.json"


class Job:
    """One folder being written.

    Attributes:
      folder: where to write now.
      target: where it will be.
      done: keys of the pieces that an earlier run wrote completely.
      finished: an earlier run of the same job finished; there is nothing to do.
    """

    def __init__(self, target: str | os.PathLike, fingerprint: str):
        """Starts or resumes the job that `fingerprint` (source, type, format) identifies.

        Raises:
          InputError: `target` is something else already, or another process is writing it.
        """
        if is_url(os.fspath(target)):
            raise InputError(f"{target}: exports go to local folders; write it to one and copy it there")
        self.target = pathlib.Path(os.path.abspath(target))
        self.folder = self.target.with_name(self.target.name + ".converting")
        self.fingerprint, self.done = fingerprint, set()
        self._lock, self._record = threading.Lock(), None
        self.finished = self._is_finished()
        if not self.finished:
            self._start()

    def _is_finished(self) -> bool:
        if not self.target.exists():
            return False
        with contextlib.suppress(OSError, ValueError, KeyError):
            if json.loads((self.target / _STAMP).read_text())["fingerprint"] == self.fingerprint:
                (self.target / _RECORD).unlink(missing_ok=True)
                return True
        if self.target.is_dir() and not any(self.target.iterdir()):
            return False
        raise InputError(f"{self.target}: exists already and is something else; choose another name or remove it")

    def _start(self) -> None:
        with writing(self.target):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._record = open(self.folder / _RECORD, "a+")  # noqa: SIM115 (open, and locked, as long as the job)
        try:
            fcntl.flock(self._record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{self.folder}: another process is writing it; wait for it or choose a name") from None
        self._record.seek(0)
        text = self._record.read()
        whole = text[: text.rfind("\n") + 1]  # a kill may have torn the last line
        lines = whole.splitlines()
        if lines and lines[0] == self.fingerprint:
            self.done = {tuple(json.loads(line)) for line in lines[1:]}
            self._record.truncate(len(whole.encode()))
            return
        if text:
            note(f"note: {self.folder} was begun from another source or dtype; starting over")
        self._clear()
        self._record.truncate(0)
        self._record.write(self.fingerprint + "\n")
        self._record.flush()

    def _clear(self) -> None:
        for entry in self.folder.iterdir():
            if entry.name == _RECORD:
                continue
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def is_done(self, key: tuple) -> bool:
        """Whether an earlier run may have written this piece; its files tell whether they are whole."""
        return key in self.done

    def discard(self, key: tuple) -> None:
        """Takes back a piece that the record has and the folder has not."""
        self.done.discard(key)

    def mark_done(self, key: tuple) -> None:
        """Records a piece as written. Call it only when its bytes are in their files."""
        with self._lock:
            self._record.write(json.dumps(key) + "\n")
            self._record.flush()

    def commit(self) -> None:
        """Moves the finished folder to its place."""
        with writing(self.target):
            (self.folder / _STAMP).write_text(json.dumps({"fingerprint": self.fingerprint}) + "\n")
            if self.target.exists():
                self.target.rmdir()  # empty, or `__init__` had refused
            os.rename(self.folder, self.target)
            (self.target / _RECORD).unlink()
        self.close()

    def close(self) -> None:
        """Lets go of the folder; what is written stays for the next run."""
        if self._record:
            self._record.close()
            self._record = None

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_exception) -> None:
        self.close()

    def check_space(self, needed: int) -> None:
        """InputError unless `needed` more bytes fit on the disk of the target."""
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"{self.target}: no space left: {human_bytes(needed)} are needed and {human_bytes(free)} are free; "
                "make room or choose another disk"
            )


class BucketJob:
    """One folder under gs:// being written; see `Job`.

    Objects appear whole or not at all, so the folder is the record: a piece is done when its objects have their sizes.
    """

    def __init__(self, target: str | os.PathLike, fingerprint: str):
        """Starts or resumes the job that `fingerprint` identifies.

        Raises:
          InputError: `target` is something else already, is forbidden, or has no bucket.
        """
        self.target = self.folder = resolve(target)
        self.fingerprint = fingerprint
        check_bucket(self.target)
        names = list_dir(self.folder)
        self.finished = _STAMP in names and self._is_ours(_STAMP)
        self._resumed = _BEGUN in names and self._is_ours(_BEGUN)
        if self.finished or self._resumed:
            return
        if names and (_STAMP in names or _BEGUN not in names):
            raise InputError(f"{self.target}: exists already and is something else; choose another name or remove it")
        with writing(self.target):
            if names:
                note(f"note: {self.target} was begun from another source or dtype; starting over")
                self.folder.rmtree()
            self._write(_BEGUN)

    def _is_ours(self, name: str) -> bool:
        with translate_io_errors(self.target), contextlib.suppress(ValueError, KeyError):
            return json.loads((self.folder / name).read_text())["fingerprint"] == self.fingerprint
        return False

    def _write(self, name: str) -> None:
        (self.folder / name).write_text(json.dumps({"fingerprint": self.fingerprint}) + "\n")

    def is_done(self, _key: tuple) -> bool:
        """See `Job.claims`."""
        return self._resumed

    def mark_done(self, key: tuple) -> None:
        """The objects themselves are the mark."""

    def check_space(self, needed: int) -> None:
        """A bucket is never full."""

    def commit(self) -> None:
        """Says that the folder is finished."""
        with writing(self.target):
            self._write(_STAMP)
            (self.folder / _BEGUN).unlink()

    def __enter__(self) -> "BucketJob":
        return self

    def __exit__(self, *_exception) -> None:
        """Nothing is held."""


def open_job(target: str | os.PathLike, fingerprint: str) -> Job | BucketJob:
    """The job that writes `target`, wherever that is."""
    return (BucketJob if is_url(target) else Job)(target, fingerprint)


@contextlib.contextmanager
def writing(target: str | os.PathLike) -> Iterator[None]:
    """Turns a full disk and a forbidden folder into one line each, whichever library reports them."""
    try:
        with translate_io_errors(target):
            yield
    except InputError:
        raise
    except Exception as error:
        text = str(error)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
            raise InputError(f"{target}: no space left on the disk; make room and run the same command again") from None
        if isinstance(error, PermissionError) or "Permission denied" in text:
            raise InputError(f"{target}: not allowed to write there; choose another folder") from None
        if getattr(error, "errno", None) == errno.EROFS:
            raise InputError(f"{target}: the disk is read-only; choose another folder") from None
        raise
