"""The answers of an evaluation run, one JSON object per line, and the settings of the run."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from vl3_jax.errors import InputError

ANSWERS, SETTINGS = "answers.jsonl", "run.json"
_REQUIRED = ("id", "task", "answer", "reference")


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
            _drop_unfinished_line(self.path)
            self.records = {record["id"]: record for record in read(self.path)} if self.path.exists() else {}
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror or error}; choose a folder that can be written") from None

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Appends answers to the file and flushes it."""
        for record in records:
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.records[record["id"]] = record
        self._file.flush()


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads all answers of a file.

    Raises:
      InputError: The file cannot be read, or one of its lines is not an answer.
    """
    records = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                record = _parse(line)
                if record is None:
                    fields = ", ".join(_REQUIRED)
                    raise InputError(f"{path}, line {number}: not an answer (a JSON object with {fields}); remove it")
                records.append(record)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"{path}: {reason}; give the {ANSWERS} of a run") from None
    return records


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and all(name in record for name in _REQUIRED) else None


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


def _drop_unfinished_line(path: pathlib.Path) -> None:
    """Removes the last line if a killed run left it incomplete."""
    if not path.exists():
        return
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        os.truncate(path, complete)
