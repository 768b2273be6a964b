"""The answers of an evaluation run, one JSON object per line in a file for each shard, and the settings of the run."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.storage.durable import rename
from vl3_jax.storage.journal import Journal, read_lines
from vl3_jax.storage.locks import hold

ANSWERS, SETTINGS = "answers.jsonl", "run.json"
_REQUIRED = ("id", "task", "answer")
_SHARD = re.compile(r"(\d+)/(\d+)")


@dataclasses.dataclass(frozen=True)
class QuestionShard:
    """A part of the questions, which one process asks.

    Attributes:
      number: Number of the part, from 1.
      count: Number of parts.
    """

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "QuestionShard":
        """Returns the shard of a text such as `2/4`.

        Raises:
          InputError: It is none.
        """
        found = _SHARD.fullmatch(text)
        shard = cls(*map(int, found.groups())) if found else cls(0)
        if not 1 <= shard.number <= shard.count:
            raise InputError(f"--shard {text}: give I/N, the part I of N, from 1/N to N/N")
        return shard

    @property
    def file(self) -> str:
        """Name of the file of its answers."""
        return ANSWERS if self.count == 1 else f"answers-{self.number}-of-{self.count}.jsonl"

    def of(self, groups: Sequence[Any]) -> Sequence[Any]:
        """Returns every `count`-th of some groups."""
        return groups[self.number - 1 :: self.count]


@contextlib.contextmanager
def open_answers(
    folder: str | os.PathLike, settings: Mapping[str, Any], shard: QuestionShard | None = None
) -> Iterator[Journal]:
    """Opens the file of answers of a run or of one of its shards, or creates it.

    Args:
      folder: Folder of the run.
      settings: Settings of the run, JSON values. Answers of runs with different settings are not mixed.
      shard: The shard that the answers are of; None for a run without shards.

    Yields:
      The file, for new answers.

    Raises:
      InputError: The folder has answers of other settings, cannot be written, or another process writes the file.
    """
    folder, file = pathlib.Path(folder), (shard or QuestionShard()).file
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(folder, f".{file}.lock"))
            _check_settings(folder / SETTINGS, settings, file)
            journal = stack.enter_context(contextlib.closing(Journal(folder / file, *_check(_REQUIRED))))
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror or error}; choose a folder that can be written") from None
        yield journal


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads all answers of a file, or of all files of a run's folder.

    Raises:
      InputError: The file cannot be read, or one of its lines is not an answer.
    """
    path = pathlib.Path(path)
    try:
        if not path.is_dir():
            return read_lines(path, *_check(_REQUIRED))
        files = sorted(path.glob("answers*.jsonl"))
        return [record for file in files for record in read_lines(file, *_check(_REQUIRED), whole_lines=True)]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; give the {ANSWERS} of a run") from None


def answered(records: Sequence[Mapping[str, Any]], hashes: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """Returns the answer to each question that has one, by id.

    Args:
      records: Lines of answer files.
      hashes: Hash of each question by its id; answers to other prompts are left out.

    Returns:
      The last valid answer to each question, else its last failure.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for record in records:
        name = record["id"]
        if (
            name in hashes
            and record.get("hash") == hashes[name]
            and (is_valid(record) or not is_valid(found.get(name)))
        ):
            found[name] = record
    return found


def is_valid(record: Mapping[str, Any] | None) -> bool:
    """Returns whether a line has an answer, rather than an error."""
    return record is not None and record["answer"] is not None and "error" not in record


def _check(required: Sequence[str]) -> tuple[Callable[[Any], dict[str, Any]], str]:
    """Returns what checks a line, and what is wrong with one that it refuses."""

    def check(record: Any) -> dict[str, Any]:
        if not isinstance(record, dict) or not all(name in record for name in required):
            raise ValueError("no answer")
        if not isinstance(record["id"], str) or not isinstance(record["task"], str):
            raise ValueError("no names")
        return record

    return check, f"not an answer (a JSON object with {', '.join(required)}); remove it"


def _check_settings(path: pathlib.Path, settings: Mapping[str, Any], file: str) -> None:
    if not path.exists():
        own = path.with_name(f"{path.name}.{file}")  # other shards begin at the same time
        own.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        rename(own, path)
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in sorted({*saved, *settings}) if saved.get(name) != settings.get(name)]
    except (ValueError, TypeError, AttributeError):
        raise InputError(f"{path}: not the settings of a run; give another --out") from None
    if changed:
        name, before, now = changed[0], saved.get(changed[0]), settings.get(changed[0])
        difference = f"{name}: {before!r} there, {now!r} now"
        raise InputError(f"{path.parent}: holds answers of another run ({difference}); give another --out")
