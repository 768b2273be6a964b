"""Computes scores from answers, and formats them as a table."""

import collections
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.evaluation.tasks import find
from vl3_jax.storage.durable import atomic_write
from vl3_jax.text_table import text_table

SCORES = "scores.json"
_COMMON = ("metric", "score", "majority", "count", "kept")


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
    rows = [("task", "metric", "score", "majority", "questions", "kept", "")]
    for name, values in tasks.items():
        kept = f"{values['kept']:.0%}" if "kept" in values else ""
        others = ", ".join(f"{key} {value:.3f}" for key, value in values.items() if key not in _COMMON)
        figures = (f"{values['score']:.3f}", f"{values['majority']:.3f}", str(values["count"]), kept)
        rows.append((name, values["metric"], *figures, others))
    mean = scores["mean"]
    rows.append(("mean", "", f"{mean['score']:.3f}", f"{mean['majority']:.3f}", f"{len(tasks)} tasks", "", ""))
    return "\n".join(text_table(rows, "<>>>>><"))


def save(scores: Mapping[str, Any], folder: str | os.PathLike) -> pathlib.Path:
    """Writes `scores.json` to a folder and returns its path.

    Raises:
      InputError: The folder cannot be written.
    """
    path = pathlib.Path(folder) / SCORES
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, (json.dumps(scores, indent=1) + "\n").encode())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; choose a folder that can be written") from None
    return path
