"""The answers of an evaluation run, one JSON object per line in a file for each shard, and the settings of the run."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.storage.journal import Journal, read_lines
from vl3_jax.storage.locks import hold
from vl3_jax.storage.run_settings import check_settings
from vl3_jax.storage.shards import Shard

ANSWERS, SETTINGS = "answers.jsonl", "run.json"
_REQUIRED = ("id", "task", "answer")


@contextlib.contextmanager
def open_answers(
    folder: str | os.PathLike, settings: Mapping[str, Any], shard: Shard | None = None
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
    folder = pathlib.Path(folder)
    file = (shard or Shard()).file(folder / ANSWERS)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(folder, f".{file.name}.lock"))
            check_settings(folder / SETTINGS, settings)
            journal = stack.enter_context(contextlib.closing(Journal(file, *_check(_REQUIRED))))
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
