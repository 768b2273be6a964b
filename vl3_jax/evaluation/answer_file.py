"""The answers of an evaluation run, one JSON object per line, and the settings of the run."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.storage.journal import Journal, read_lines

ANSWERS, SETTINGS = "answers.jsonl", "run.json"
_REQUIRED = ("id", "task", "answer", "reference")
_REFUSAL = f"not an answer (a JSON object with {', '.join(_REQUIRED)}); remove it"


class AnswerFile:
    """The `answers.jsonl` of one run. Opening it again with the same settings resumes the run.

    Attributes:
      path: Path of the file.
      records: The answers written by now, by question id.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any]):
        """Opens the folder of a run, or creates it.

        Args:
          folder: Folder of the run.
          settings: Settings of the run, JSON values. Answers of runs with different settings are not mixed.

        Raises:
          InputError: The folder has answers of other settings, or cannot be written.
        """
        folder = pathlib.Path(folder)
        self.path = folder / ANSWERS
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check_settings(folder / SETTINGS, dict(settings))
            self._journal = Journal(self.path, _check, _REFUSAL)
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror or error}; choose a folder that can be written") from None
        self.records = {record["id"]: record for record in self._journal.entries}

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_) -> None:
        self._journal.close()

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Appends answers to the file."""
        for record in records:
            self._journal.append(record)
            self.records[record["id"]] = record


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads all answers of a file.

    Raises:
      InputError: The file cannot be read, or one of its lines is not an answer.
    """
    try:
        return read_lines(path, _check, _REFUSAL)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; give the {ANSWERS} of a run") from None


def _check(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict) or not all(name in record for name in _REQUIRED):
        raise ValueError("no answer")
    return record


def _check_settings(path: pathlib.Path, settings: dict[str, Any]) -> None:
    if not path.exists():
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in sorted({*saved, *settings}) if saved.get(name) != settings.get(name)]
    except (ValueError, TypeError, AttributeError):
        raise InputError(f"{path}: not the settings of a run; give another --out") from None
    if changed:
        name = changed[0]
        raise InputError(
            f"{path.parent}: holds answers of another run ({name}: {saved.get(name)!r} there, {settings.get(name)!r} "
            "now); give another --out"
        )
