"""Answers on disk, one JSON object a line: written as they come, read again to go on or to score."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from vl3_jax.errors import InputError

ANSWERS, SETTINGS = "answers.jsonl", "run.json"
_NEEDED = ("id", "task", "answer", "truth")


class AnswerFile:
    """`answers.jsonl` of one run; whoever opens it again with the same settings goes on with it.

    Attributes:
      path: of the file.
      records: the answers so far, by question id.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any]):
        """Opens or makes the folder.

        Args:
          folder: of the run.
          settings: JSON values; answers of other settings must not be mixed.

        Raises:
          InputError: answers of other settings are there; the folder cannot be written.
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
        """Writes answers through to the file."""
        for record in records:
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.records[record["id"]] = record
        self._file.flush()


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All answers of a file. InputError names the file, or the line that is none."""
    records = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                record = _parsed(line)
                if record is None:
                    fields = ", ".join(_NEEDED)
                    raise InputError(f"{path}, line {number}: not an answer (a JSON object with {fields}); remove it")
                records.append(record)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"{path}: {reason}; give the {ANSWERS} of a run") from None
    return records


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and all(name in record for name in _NEEDED) else None


def _check_settings(path: pathlib.Path, settings: dict[str, Any]) -> None:
    if not path.exists():
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in sorted({*found, *settings}) if found.get(name) != settings.get(name)]
    except (ValueError, TypeError, AttributeError):
        raise InputError(f"{path}: not the settings of a run; give another --out") from None
    if changed:
        name = changed[0]
        raise InputError(
            f"{path.parent}: holds answers of another run ({name}: {found.get(name)!r} there, {settings.get(name)!r} "
            "now); give another --out"
        )


def _drop_unfinished_line(path: pathlib.Path) -> None:
    """What a killed run was writing."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
