"""From answers to scores, and to the table that is printed."""

import collections
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.evaluation.tasks import find

SCORES = "scores.json"
_COMMON = ("metric", "score", "majority", "count", "kept")
_WIDTHS = (10, 8, 10, 11, 7)


def score(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of all tasks that have answers.

    Args:
      records: as in answers.jsonl.

    Returns:
      "tasks": for each its "metric", "score", "majority" (what the best constant answer scores), "count", "kept" (share
      of its vision tokens that pruning left, where there were any) and what its metric has beside it; "mean": of
      "score" and "majority" over the tasks.

    Raises:
      InputError: no answers; an unknown task.
    """
    by_task = collections.defaultdict(list)
    for record in records:
        by_task[record["task"]].append(record)
    if not by_task:
        raise InputError("there are no answers to score")
    found = {}
    for task in find(by_task):
        mine = by_task[task.name]
        try:
            values = task.evaluate([one["answer"] for one in mine], [one["truth"] for one in mine])
        except (TypeError, KeyError, AttributeError, IndexError) as error:
            raise InputError(f"{task.name}: an answer or truth is not of this task ({error!r})") from None
        before = sum(one.get("visual_tokens_before_pruning", 0) for one in mine)
        kept = {"kept": sum(one.get("visual_tokens", 0) for one in mine) / before} if before else {}
        found[task.name] = {"metric": task.metric, **values, **kept}
    mean = {name: sum(one[name] for one in found.values()) / len(found) for name in ("score", "majority")}
    return {"tasks": found, "mean": mean}


def table(scores: Mapping[str, Any]) -> str:
    """Lines for people: each task, then the mean."""
    tasks = scores["tasks"]
    first = max(len(name) for name in (*tasks, "task"))
    lines = [_line("task", first, ("metric", "score", "majority", "questions", "kept"))]
    for name, one in tasks.items():
        kept = f"{one['kept']:.0%}" if "kept" in one else ""
        cells = (one["metric"], _decimal(one["score"]), _decimal(one["majority"]), str(one["count"]), kept)
        beside = ", ".join(f"{key} {_decimal(value)}" for key, value in one.items() if key not in _COMMON)
        lines.append(f"{_line(name, first, cells)}  {beside}".rstrip())
    mean = scores["mean"]
    cells = ("", _decimal(mean["score"]), _decimal(mean["majority"]), f"{len(tasks)} tasks", "")
    return "\n".join([*lines, _line("mean", first, cells).rstrip()])


def save(scores: Mapping[str, Any], folder: str | os.PathLike) -> pathlib.Path:
    """Writes scores.json. InputError if the folder cannot be written."""
    path = pathlib.Path(folder) / SCORES
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; choose a folder that can be written") from None
    return path


def _line(name: str, width: int, cells: Iterable[str]) -> str:
    return name.ljust(width) + "".join(cell.rjust(size) for cell, size in zip(cells, _WIDTHS, strict=True))


def _decimal(value: float) -> str:
    return f"{value:.3f}"
