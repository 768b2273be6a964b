"""Computes scores from answers, and formats them as a table."""

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
    """Scores all tasks that have answers.

    Args:
      records: Lines of an `answers.jsonl`.

    Returns:
      "tasks": for each task its "metric", "score", "majority" (the score of the best constant answer), "count", "kept"
      (the share of its vision tokens left by pruning, if it has any) and further values of its metric. "mean": the
      means of "score" and "majority" over the tasks.

    Raises:
      InputError: There are no answers, a task is unknown, or an answer does not suit its task.
    """
    by_task = collections.defaultdict(list)
    for record in records:
        by_task[record["task"]].append(record)
    if not by_task:
        raise InputError("there are no answers to score")
    tasks = {}
    for task in find(by_task):
        task_records = by_task[task.name]
        answers = [record["answer"] for record in task_records]
        try:
            values = task.evaluate(answers, [record["reference"] for record in task_records])
        except (TypeError, KeyError, AttributeError, IndexError) as error:
            raise InputError(f"{task.name}: an answer or reference is not of this task ({error!r})") from None
        before = sum(record.get("visual_tokens_before_pruning", 0) for record in task_records)
        kept = {"kept": sum(record.get("visual_tokens", 0) for record in task_records) / before} if before else {}
        tasks[task.name] = {"metric": task.metric, **values, **kept}
    mean = {name: sum(values[name] for values in tasks.values()) / len(tasks) for name in ("score", "majority")}
    return {"tasks": tasks, "mean": mean}


def table(scores: Mapping[str, Any]) -> str:
    """Formats scores as a table with a line for each task and one for the mean."""
    tasks = scores["tasks"]
    width = max(len(name) for name in (*tasks, "task"))
    lines = [_line("task", width, ("metric", "score", "majority", "questions", "kept"))]
    for name, values in tasks.items():
        kept = f"{values['kept']:.0%}" if "kept" in values else ""
        cells = (values["metric"], _decimal(values["score"]), _decimal(values["majority"]), str(values["count"]), kept)
        others = ", ".join(f"{key} {_decimal(value)}" for key, value in values.items() if key not in _COMMON)
        lines.append(f"{_line(name, width, cells)}  {others}".rstrip())
    mean = scores["mean"]
    cells = ("", _decimal(mean["score"]), _decimal(mean["majority"]), f"{len(tasks)} tasks", "")
    return "\n".join([*lines, _line("mean", width, cells).rstrip()])


def save(scores: Mapping[str, Any], folder: str | os.PathLike) -> pathlib.Path:
    """Writes `scores.json` to a folder and returns its path.

    Raises:
      InputError: The folder cannot be written.
    """
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
