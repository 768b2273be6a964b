"""One writer a folder: a lock that names its holder, and that a holder which was killed does not keep.

    with hold(workdir) as lock:
        ...
        lock.check()     # before each write that must not come after another job has taken over
        save(...)

A local folder is locked with `flock`, which the system releases with the process, however that ends. Under gs:// the
lock is an object that only its holder renews, every HEARTBEAT seconds, guarded by the object's generation. One that is
not renewed for STALE seconds, or whose process on this machine is gone, is taken over; should its holder wake up again,
it finds out at its next heartbeat or check and ends at once. Readers need no lock.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, NoReturn

from vl3_jax.errors import InputError, printable
from vl3_jax.storage.paths import bucket_object, is_url, translate_io_errors

logger = logging.getLogger(__name__)

LOCK = ".vl3_lock"
HEARTBEAT = 10.0  # seconds
STALE = 60.0  # seconds without a heartbeat
_POLL = 1.0  # seconds
_EXIT_LOST = 2
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # file systems without `flock`


class Lock:
    """A lock that is held, on a local folder."""

    def check(self) -> None:
        """Ends the process with one line if another job has taken the lock over; under gs:// only."""


@contextlib.contextmanager
def hold(folder: str | os.PathLike, name: str = LOCK, wait: bool = False) -> Iterator[Lock]:
    """Holds the lock of a folder, which is made if it does not exist.

    Args:
      folder: Local folder, or one under gs://.
      name: Name of the lock in the folder, where several jobs may write different things there.
      wait: Whether to wait for another holder instead of refusing; local folders only.

    Raises:
      InputError: Another job holds the lock; the message names its host, its process and since when.
      OSError: The folder cannot be written.
    """
    if is_url(folder):
        with translate_io_errors(folder):
            lock = _BucketLock(folder, name)
        with contextlib.closing(lock):
            yield lock
        return
    path = pathlib.Path(folder)
    is_new = not path.exists()
    descriptor = _lock_file(path / name, wait)
    try:
        yield Lock()
    finally:
        if _is_file(descriptor, path / name):
            (path / name).unlink(missing_ok=True)
        os.close(descriptor)
        if is_new:
            with contextlib.suppress(OSError):  # it is used
                path.rmdir()


def _lock_file(file: pathlib.Path, wait: bool) -> int:
    """Returns the descriptor of the locked file, which holds who has locked it."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # its holder has removed the folder meanwhile
            continue
        try:
            _flock(descriptor, file, wait)
            if _is_file(descriptor, file):
                os.truncate(descriptor, 0)
                os.write(descriptor, json.dumps(_own_name()).encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has removed the file meanwhile


def _is_file(descriptor: int, file: pathlib.Path) -> bool:
    """Returns whether an open file is still the one of this name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    return False


def _flock(descriptor: int, file: pathlib.Path, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 4096, 0)
        if not wait:
            raise _refusal(file.parent, holder) from None
        logger.info("%s: %s is writing it; waiting", file.parent, _described(holder))
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "warning: %s: its file system has no locks (%s), so nothing keeps a second job away; see to it that no "
            "other one writes there",
            file.parent,
            error.strerror,
        )


class _BucketLock(Lock):
    """A lock under gs://, renewed by a thread."""

    def __init__(self, folder: str | os.PathLike, name: str):
        self._folder, self._own = os.fspath(folder), {**_own_name(), "token": uuid.uuid4().hex}
        self._object, self._guard, self._closed = bucket_object(folder, name), threading.Lock(), threading.Event()
        self._generation = self._acquire()
        threading.Thread(target=self._renew, name="vl3-lock", daemon=True).start()

    def check(self) -> None:
        with self._guard, translate_io_errors(self._folder):
            if self._found() != self._generation:
                self._end_if_lost()

    def close(self) -> None:
        """Gives the lock back."""
        from google.cloud.exceptions import GoogleCloudError

        with self._guard:
            self._closed.set()
            with contextlib.suppress(GoogleCloudError, OSError):  # whoever comes next takes it over
                self._blob().delete(if_generation_match=self._generation)

    def _acquire(self) -> int:
        """Creates the object, or takes a stale one over, and returns its generation."""
        from google.cloud.exceptions import PreconditionFailed

        found, deadline = self._found(), time.monotonic() + STALE
        while found and not _is_gone(self._holder()) and time.monotonic() < deadline:
            time.sleep(_POLL)
            before, found = found, self._found()
            if found not in (0, before):  # renewed
                raise _refusal(self._folder, self._holder())
        if found:
            described = _described(self._holder())
            logger.warning("note: %s: %s gave no sign of life; taking over", self._folder, described)
        try:
            return self._write(found)
        except PreconditionFailed:  # another job was faster
            raise _refusal(self._folder, self._holder()) from None

    def _holder(self) -> bytes:
        """Returns the content of the object; empty if there is none."""
        from google.cloud.exceptions import NotFound

        try:
            return self._blob().download_as_bytes()
        except NotFound:
            return b""

    def _blob(self) -> Any:
        """Returns the object, whatever its generation; once it has been asked, a blob stands for the one it had."""
        return self._object.bucket.blob(self._object.name)

    def _found(self) -> int:
        """Returns the generation of the object; 0 if there is none."""
        from google.cloud.exceptions import NotFound

        try:
            blob = self._blob()
            blob.reload()
        except NotFound:
            return 0
        return int(blob.generation)

    def _write(self, generation: int) -> int:
        """Writes the object if it still has a generation, and returns the new one."""
        from google.cloud.exceptions import PreconditionFailed

        try:
            blob = self._blob()
            blob.upload_from_string(json.dumps(self._own), if_generation_match=generation)
        except PreconditionFailed:
            # The answer to an earlier try may have been lost on its way.
            if not self._is_own():
                raise
            return self._found()
        return int(blob.generation)

    def _is_own(self) -> bool:
        return _parsed(self._holder()).get("token") == self._own["token"]

    def _renew(self) -> None:
        from google.cloud.exceptions import PreconditionFailed

        while not self._closed.wait(HEARTBEAT):
            with self._guard:
                if self._closed.is_set():
                    return
                try:
                    self._generation = self._write(self._generation)
                except PreconditionFailed:
                    self._end_if_lost()
                except Exception as error:  # the network may come back
                    logger.warning("warning: %s: its lock cannot be renewed (%s)", self._folder, printable(error))

    def _end_if_lost(self) -> None:
        if self._is_own():
            self._generation = self._found()
            return
        _end_process(f"{self._folder}: {_described(self._holder())} has taken over since; this one ends")


def _end_process(line: str) -> NoReturn:
    """Ends the process at once: whatever it would still write is no longer its own to write."""
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{line}\n".encode())
    os._exit(_EXIT_LOST)


def _own_name() -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds")
    return {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "since": now}


def _machine() -> str:
    """Returns a name of what a process id is unique in: this boot of the machine, and the container; "" if unknown."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_gone(holder: bytes) -> bool:
    """Returns whether the holder was a process of this machine which has ended."""
    found = _parsed(holder)
    if not found.get("machine") or found["machine"] != _machine() or not isinstance(found.get("pid"), int):
        return False
    try:
        os.kill(found["pid"], 0)
    except OSError as error:
        return error.errno == errno.ESRCH
    return False


def _parsed(holder: bytes) -> dict[str, Any]:
    try:
        value = json.loads(holder)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _described(holder: bytes) -> str:
    found = _parsed(holder)
    if not found:
        return "another job"
    return f"process {found.get('pid')} on host {found.get('host')}, since {found.get('since')},"


def _refusal(folder: str | os.PathLike, holder: bytes) -> InputError:
    return InputError(
        f"{folder}: {_described(holder)} is writing it; wait for that job or stop it, or choose another folder"
    )
