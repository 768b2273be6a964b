"""The answers of an evaluation run, one JSON object per line, and the settings of the run."""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.storage.journal import Journal, read_lines

ANSWERS, SETTINGS = "answers.jsonl", "run.json"
_REQUIRED = ("id", "task", "answer", "reference")


@contextlib.contextmanager
def open_answers(folder: str | os.PathLike, settings: dict[str, Any]) -> Iterator[Journal]:
    """Opens the `answers.jsonl` of one run, or creates it; with the same settings it resumes the run.

    Args:
      folder: Folder of the run.
      settings: Settings of the run, JSON values. Answers of runs with different settings are not mixed.

    Yields:
      The file, whose entries are the answers of earlier runs.

    Raises:
      InputError: The folder has answers of other settings, or cannot be written.
    """
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_settings(folder / SETTINGS, settings)
        journal = Journal(folder / ANSWERS, *_check(_REQUIRED))
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror or error}; choose a folder that can be written") from None
    with contextlib.closing(journal):
        yield journal


def read(path: str | os.PathLike, required: Sequence[str] = _REQUIRED) -> list[dict[str, Any]]:
    """Reads all answers of a file.

    Args:
      path: The file.
      required: Keys that every line must have.

    Raises:
      InputError: The file cannot be read, or one of its lines is not an answer.
    """
    try:
        return read_lines(path, *_check(required))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; give the {ANSWERS} of a run") from None


def _check(required: Sequence[str]) -> tuple[Callable[[Any], dict[str, Any]], str]:
    """Returns what checks a line, and what is wrong with one that it refuses."""

    def check(record: Any) -> dict[str, Any]:
        if not isinstance(record, dict) or not all(name in record for name in required):
            raise ValueError("no answer")
        if not isinstance(record["id"], str) or not isinstance(record["task"], str):
            raise ValueError("no names")
        return record

    return check, f"not an answer (a JSON object with {', '.join(required)}); remove it"


def _check_settings(path: pathlib.Path, settings: dict[str, Any]) -> None:
    if not path.exists():
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in sorted({*saved, *settings}) if saved.get(name) != settings.get(name)]
    except (ValueError, TypeError, AttributeError):
        raise InputError(f"{path}: not the settings of a run; give another --out") from None
    if changed:
        name, before, now = changed[0], saved.get(changed[0]), settings.get(changed[0])
        difference = f"{name}: {before!r} there, {now!r} now"
        raise InputError(f"{path.parent}: holds answers of another run ({difference}); give another --out")
