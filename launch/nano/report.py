#!/usr/bin/env python3
"""Tables and figures of docs/nano.md, from the runs of `train.py`.

    python launch/nano/report.py                                                 the questions alone
    python launch/nano/report.py --runs RUNS --second RUNS/second [--goals FILE]

Tables replace what is between `<!-- report:NAME -->` and `<!-- end -->` in docs/nano.md and README.md. Figures, and all
numbers as results.json, go to docs/nano. FILE has the target score of each task, as JSON: {"nano/digit": 0.9, ...}.

exit codes: 0 done, 2 bad input
"""

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.synthetic.registry import BOX, CAPTION, EVALUATED_TASKS, EXACT, SPAN, SPEAK, TASKS, example
from data_pipelines.synthetic.samples import Example
from vl3_jax.errors import InputError
from vl3_jax.evaluation.benchmark import CONSTANT, OVERALL
from vl3_jax.evaluation.benchmarks.synthetic import QuestionSelection

ROOT = pathlib.Path(__file__).parents[2]
FIGURES = "nano"
RESULTS = "results.json"
STAGES = range(5)
METRICS = {
    EXACT: "exact match",
    BOX: "IoU of at least 0.5",
    SPAN: "mean IoU of times",
    CAPTION: "F1 of attributes",
    SPEAK: "F1 of moments",
}
STATIC = "nano/static"
_SECTION = re.compile(r"(<!-- report:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def collect(runs: pathlib.Path, second: pathlib.Path | None, goals: Mapping[str, float]) -> dict[str, Any]:
    """Collects the numbers of a whole training.

    Args:
      runs: Folder of the runs of `train.py`.
      second: Folder of runs with another seed, or None.
      goals: Target scores by task.

    Returns:
      "tasks": for each task "metric", "count", "score", "majority" (the score of the best constant answer), "stages"
      (the scores after each stage) and, where they exist, "blind", "unpruned", "kept", "second" and "goal".
      "training": for each stage "steps", "samples" and "minutes".

    Raises:
      InputError: A run is not complete.
    """
    stages = [scores(runs / f"eval{stage}") for stage in STAGES]
    comparisons = {name: scores(runs / name) for name in ("blind", "unpruned")}
    if second is not None:
        comparisons["second"] = scores(second / f"eval{STAGES[-1]}")
    tasks = {}
    for name, values in stages[-1].items():
        tasks[name] = {key: values[key] for key in ("metric", "count", "score", "majority", "kept") if key in values}
        tasks[name]["stages"] = [scores[name]["score"] for scores in stages]
        tasks[name] |= {key: scores[name]["score"] for key, scores in comparisons.items() if name in scores}
        if name in goals:
            tasks[name]["goal"] = goals[name]
    return {"tasks": tasks, "training": [_training(runs / f"nano{stage}") for stage in STAGES]}


def accuracy(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a table of each task's score beside that of the best constant answer."""
    columns = {"task": "", "metric": "", "nano": "score", "constant answer": "majority"}
    columns |= {title: key for title, key in (("goal", "goal"), ("other seed", "second")) if _having(tasks, key)}
    rows = []
    for name, values in tasks.items():
        cells = [_percent(values[key]) if key in values else "" for key in columns.values() if key]
        rows.append([name.partition("/")[2], METRICS[values["metric"]], *cells])
    means = ["" if key == "goal" else _percent(_mean(tasks, key)) for key in columns.values() if key]
    return _markdown([list(columns), *rows, ["mean", "", *means]])


def training(results: Mapping[str, Any]) -> str:
    """Returns a table of the cost of each stage and the mean score after it."""
    rows = [["stage", "steps", "samples", "minutes", "mean score after it"]]
    for stage, cost in enumerate(results["training"]):
        mean = sum(task["stages"][stage] for task in results["tasks"].values()) / len(results["tasks"])
        numbers = [f"{cost['steps']:,}", f"{cost['samples']:,}", f"{cost['minutes']:.0f}"]
        rows.append([str(stage), *numbers, _percent(mean)])
    return _markdown(rows)


def checks(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a table of the criteria besides the scores of the tasks."""
    rows = [["check", "criterion", "result"]]
    if _having(tasks, "second"):
        means = _mean(tasks, "score"), _mean(tasks, "second")
        rows.append(["mean score, this seed and another", "at most 5 points apart", " and ".join(map(_percent, means))])
    if blind := _having(tasks, "blind"):
        worst = max(blind, key=lambda name: blind[name]["blind"] - blind[name]["majority"])
        excess = blind[worst]["blind"] - blind[worst]["majority"]
        check = "another question's media: most above the constant answer"
        rows.append([check, "at most 5 points", f"{_percent(excess)} ({worst.partition('/')[2]})"])
    if videos := _having(tasks, "unpruned"):
        means = _mean(videos, "score"), _mean(videos, "unpruned")
        check = "mean score of videos, with and without pruning"
        rows.append([check, "pruning costs at most 1 point", " and ".join(map(_percent, means))])
    if STATIC in tasks:
        pruned = f"{_percent(1 - tasks[STATIC]['kept'])} %"
        rows.append(["vision tokens pruned from almost static videos", "at least 50 %", pruned])
    return _markdown(rows)


def questions() -> tuple[dict[str, Example], str]:
    """Returns the first held-out sample of each task, and the table of their questions."""
    selection = QuestionSelection()
    samples = {name: example(name, selection.split, selection.seed, 0) for name in EVALUATED_TASKS}
    rows = [["task", "question", "answer"]]
    for name, sample in samples.items():
        words = ", ".join(f"{text} ({time:.0f} s)" for role, text, time in sample.utterances if role == "assistant")
        rows.append([name, sample.question, f"`{words or sample.answer}`"])
    return samples, _markdown(rows)


def fill(path: pathlib.Path, sections: Mapping[str, str]) -> None:
    """Replaces the given sections of a page; other sections stay unchanged."""
    text = path.read_text(encoding="utf-8")

    def replacement(match: re.Match) -> str:
        return f"{match[1]}{sections[match[2]]}\n{match[3]}" if match[2] in sections else match[0]

    path.write_text(_SECTION.sub(replacement, text), encoding="utf-8")


def scores(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns metric, count, score, majority and kept of each task, shares of 1."""
    try:
        tasks = json.loads((folder / "results.json").read_text(encoding="utf-8"))["tasks"]
        return {name: _values(name, summary) for name, summary in tasks.items()}
    except (OSError, ValueError, KeyError):
        raise InputError(f"{folder}: no scores; run launch/nano/train.py to its end") from None


def _values(name: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    kept = {} if summary["kept"] is None else {"kept": summary["kept"]}
    score, majority = (round(summary["metrics"][key] / 100, 12) for key in (OVERALL, CONSTANT))
    metric = TASKS[name.partition("/")[2]].metric
    return {"metric": metric, "count": summary["n"], "score": score, "majority": majority, **kept}


def _metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of a workdir's metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _training(workdir: pathlib.Path) -> dict[str, float]:
    """Returns the steps, samples and minutes of a stage, summed over its logged metrics."""
    samples = seconds = step = 0
    for report in _metrics(workdir):
        if "seconds/step" in report:
            elapsed = report["seconds/step"] * (report["step"] - step)
            step, seconds, samples = report["step"], seconds + elapsed, samples + elapsed * report["samples/s"]
    return {"steps": step, "samples": round(samples), "minutes": round(seconds / 60, 1)}


def _having(tasks: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Mapping[str, Any]]:
    return {name: values for name, values in tasks.items() if key in values}


def _mean(tasks: Mapping[str, Mapping[str, Any]], key: str) -> float:
    values = [task[key] for task in tasks.values() if key in task]
    return sum(values) / len(values)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--runs", type=pathlib.Path, metavar="DIR", help="the --runs folder of train.py")
    add("--second", type=pathlib.Path, metavar="DIR", help="a --runs folder with another --seed")
    add("--goals", type=pathlib.Path, metavar="FILE", help="target scores, JSON")
    add("--root", type=pathlib.Path, default=ROOT, metavar="DIR", help="folder of README.md and docs")
    arguments = parser.parse_args(argv)
    folder = arguments.root / "docs" / FIGURES
    try:
        goals = json.loads(arguments.goals.read_text(encoding="utf-8")) if arguments.goals else {}
        results = collect(arguments.runs, arguments.second, goals) if arguments.runs else None
        import figures
    except (InputError, OSError, ValueError, ImportError) as error:
        advice = "; pip install 'vl3_jax[bench]'" if isinstance(error, ImportError) else ""
        print(f"report.py: {error}{advice}", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    samples, table = questions()
    sections = {"questions": table}
    figures.examples(samples, folder / "questions.png")
    if results:
        (folder / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        tasks = results["tasks"]
        sections |= {"accuracy": accuracy(tasks), "training": training(results), "checks": checks(tasks)}
        figures.losses([_metrics(arguments.runs / f"nano{stage}") for stage in STAGES], folder / "loss.png")
        sections["loss"] = f"![Loss of each task over all stages]({FIGURES}/loss.png)"
        figures.scores(tasks, folder / "stages.png")
        sections["stages"] = f"![Scores after each stage]({FIGURES}/stages.png)"
    for path in (arguments.root / "README.md", arguments.root / "docs" / "nano.md"):
        fill(path, sections)
    return 0


if __name__ == "__main__":
    sys.exit(main())
