"""The files of answers of a batch: one for each process that writes, merged into one when every request is answered."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vl3_jax.batch.request_file import ID_PREFIX, key_of
from vl3_jax.errors import InputError
from vl3_jax.storage import durable
from vl3_jax.storage.disk_space import translate_full_disk
from vl3_jax.storage.journal import LineLog, whole_lines
from vl3_jax.storage.locks import hold
from vl3_jax.storage.paths import is_url
from vl3_jax.storage.run_settings import check_settings
from vl3_jax.storage.shards import Shard, shard_files, shard_of

PENDING, FAILED, ANSWERED = 0, 1, 2
_FLUSH_SECONDS = 1.0
_BEGIN = json.dumps({"id": ID_PREFIX}).removesuffix('"}').encode()


class AnswerParts:
    """The files of answers.

    Args:
      path: The file that holds all answers in the end.
      keys: [lines] uint64, the keys of the lines of the file of requests.
      used: [lines] bool, which of them are requests.

    Raises:
      InputError: The path is no place for a local file.
    """

    def __init__(self, path: str | os.PathLike, keys: np.ndarray, used: np.ndarray):
        if is_url(path):
            raise InputError(f"{path}: answers are appended to a file; give one on a disk, which processes may share")
        self.path = pathlib.Path(os.path.abspath(path))
        if self.path.is_dir():
            raise InputError(f"{path}: a folder; give the name of a file, such as answers.jsonl")
        self._used = used
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    @contextlib.contextmanager
    def open(self, shard: Shard, settings: Mapping[str, Any]) -> Iterator[tuple[LineLog, np.ndarray]]:
        """Opens the file of a shard for new answers, or creates it.

        Args:
          shard: The part of the requests that this process answers.
          settings: What the answers depend on, JSON values. Answers of different settings are not mixed.

        Yields:
          The file, and what the files of all shards hold of each line (`states`).

        Raises:
          InputError: The answers that are there are of other settings or are none, another process writes this file, or
            processes of another number of shards are at work.
        """
        file = shard.file(self.path)
        with contextlib.ExitStack() as stack:
            try:
                with self._nobody_merges():
                    stack.enter_context(hold(self.path.parent, _lock(file)))
                    self._refuse_others(shard)
                check_settings(self.path.with_name(f"{self.path.name}.run.json"), settings)
                for part in shard_files(self.path):
                    _check_end(part)
                states = self.states()
                log = stack.enter_context(contextlib.closing(LineLog(file, _FLUSH_SECONDS)))
            except OSError as error:
                raise InputError(f"{file}: {error.strerror or error}; choose a file that can be written") from None
            yield log, states

    def states(self) -> np.ndarray:
        """Returns what the files hold of each line, [lines] uint8: `PENDING`, `FAILED` or `ANSWERED`.

        Raises:
          InputError: A line is no answer; names it.
        """
        states = np.zeros(len(self._order), np.uint8)
        for _, index, is_answer in self._records():
            if index is not None:
                states[index] = max(states[index], ANSWERED if is_answer else FAILED)
        return states

    def merge(self) -> bool:
        """Merges the files into one if every request is answered or has failed, and nobody writes any more.

        An answer replaces failures of its request, and a later record an earlier one. Answers to requests that are no
        longer there are left out.

        Returns:
          Whether the one file holds an answer or a failure of every request.
        """
        if not self.states()[self._used].all():
            return False
        with self._nobody_merges(), contextlib.ExitStack() as stack:
            parts = [part for part in shard_files(self.path) if part != self.path]
            try:
                for part in (self.path, *parts):
                    stack.enter_context(hold(self.path.parent, _lock(part)))
            except InputError:
                return False  # its process merges when it ends
            chosen, count = self._choose()
            if (chosen[self._used] < 0).any():
                return False
            if parts or count > self._used.sum():
                self._write(chosen)
                for part in parts:
                    part.unlink()
            return True

    def _choose(self) -> tuple[np.ndarray, int]:
        """Returns the place of each line's record among those of all files, and their number.

        Returns:
          [lines] int64, the place of the last answer, else of the last failure, else -1; and the number of all records.
        """
        chosen, is_answered = np.full(len(self._order), -1), np.zeros(len(self._order), bool)
        count = 0
        for place, (_, index, is_answer) in enumerate(self._records()):
            count = place + 1
            if index is not None and (is_answer or not is_answered[index]):
                chosen[index], is_answered[index] = place, is_answer
        return chosen, count

    def _write(self, chosen: np.ndarray) -> None:
        """Writes the chosen records to the one file."""
        partial = self.path.with_name(f"{self.path.name}.partial")
        with translate_full_disk(partial):
            with open(partial, "wb") as file:
                for place, (line, index, _) in enumerate(self._records()):
                    if index is not None and chosen[index] == place:
                        file.write(line)
            durable.rename(partial, self.path)

    def _records(self) -> Iterator[tuple[bytes, int | None, bool]]:
        """Yields each line of all files, the index of its request if there is one, and whether it is an answer."""
        for part in shard_files(self.path):
            for number, line in whole_lines(part):
                try:
                    record = json.loads(line)
                    key = key_of(record["id"])
                    is_answer = record["response"] is not None
                    if key is None:
                        raise ValueError
                except (ValueError, KeyError, TypeError):
                    raise InputError(
                        f"{part}, line {number}: not an answer of a batch; remove the line, or give another --out"
                    ) from None
                yield line, self._index(key), is_answer

    def _index(self, key: int) -> int | None:
        place = int(np.searchsorted(self._sorted, np.uint64(key)))
        found = place < len(self._sorted) and int(self._sorted[place]) == key
        return int(self._order[place]) if found else None

    def _nobody_merges(self) -> contextlib.AbstractContextManager:
        """Waits until no process merges, and lets none begin to write or merge as long as the context is open."""
        return hold(self.path.parent, f".{self.path.name}.merge.lock", wait=True)

    def _refuse_others(self, shard: Shard) -> None:
        """Refuses to start beside processes that have divided the requests in another way."""
        for lock in self.path.parent.glob(".*.lock"):
            file = self.path.with_name(lock.name.removeprefix(".").removesuffix(".lock"))
            other = shard_of(file, self.path)
            if other is not None and other.count != shard.count:
                with hold(self.path.parent, lock.name):
                    pass


def counts(states: np.ndarray) -> Sequence[int]:
    """Returns the numbers of requests that are pending, have failed, and are answered."""
    return np.bincount(states, minlength=3).tolist()


def _lock(file: pathlib.Path) -> str:
    return f".{file.name}.lock"


def _check_end(file: pathlib.Path) -> None:
    """Refuses a file whose last line is neither whole nor the begin of an answer: it is not ours to cut it off."""
    line = b"\n"
    with open(file, "rb") as opened:
        for line in opened:  # noqa: B007 (the last one is looked at)
            pass
    if not line.endswith(b"\n") and not line.startswith(_BEGIN[: len(line)]):
        raise InputError(f"{file}: its last line is no answer of a batch; give another --out")
