#!/usr/bin/env python3
"""Tables and figures of docs/nano.md, out of what `train.py` left.

    python launch/nano/report.py                                                 the questions alone
    python launch/nano/report.py --runs RUNS --second RUNS/second [--goals FILE]

Tables go between `<!-- report:NAME -->` and `<!-- end -->` in docs/nano.md and README.md; figures, and the numbers as
results.json, into docs/nano. FILE says which score a task should reach: {"nano/digit": 0.9, ...}.

exit codes: 0 done, 2 bad input
"""

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.synthetic.registry import BOX, CAPTION, EXACT, JUDGED, SPAN, SPEAK, example
from vl3_jax.errors import InputError
from vl3_jax.evaluation.tasks import QuestionSelection

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
STILL = "nano/static"
_PLACE = re.compile(r"(<!-- report:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def collect(runs: pathlib.Path, second: pathlib.Path | None, goals: Mapping[str, float]) -> dict[str, Any]:
    """All numbers of one training.

    Args:
      runs: of `train.py`.
      second: of the same with another seed.
      goals: scores to be reached, by task.

    Returns:
      "tasks": by name, "metric", "count", "score", "majority" (of a constant answer), "stages" (the score after each)
      and, where there are such, "blind", "unpruned", "kept", "second", "goal"; "training": of each stage "steps",
      "samples", "minutes".

    Raises:
      InputError: a run that is not finished.
    """
    stages = [_scores(runs / f"eval{stage}") for stage in STAGES]
    beside = {name: _scores(runs / name) for name in ("blind", "unpruned")}
    if second is not None:
        beside["second"] = _scores(second / f"eval{STAGES[-1]}")
    tasks = {}
    for name, one in stages[-1].items():
        tasks[name] = {key: one[key] for key in ("metric", "count", "score", "majority", "kept") if key in one}
        tasks[name]["stages"] = [found[name]["score"] for found in stages]
        tasks[name] |= {key: found[name]["score"] for key, found in beside.items() if name in found}
        if name in goals:
            tasks[name]["goal"] = goals[name]
    return {"tasks": tasks, "training": [_training(runs / f"nano{stage}") for stage in STAGES]}


def accuracy(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Each task's score beside that of a constant answer."""
    columns = {"task": "", "judged by": "", "nano": "score", "constant answer": "majority"}
    columns |= {title: key for title, key in (("goal", "goal"), ("other seed", "second")) if _known(tasks, key)}
    rows = []
    for name, one in tasks.items():
        values = [_percent(one[key]) if key in one else "" for key in columns.values() if key]
        rows.append([name.partition("/")[2], METRICS[one["metric"]], *values])
    means = ["" if key == "goal" else _percent(_mean(tasks, key)) for key in columns.values() if key]
    return _markdown([list(columns), *rows, ["mean", "", *means]])


def training(results: Mapping[str, Any]) -> str:
    """What each stage took, and what came of it."""
    rows = [["stage", "steps", "samples", "minutes", "mean score after it"]]
    for stage, one in enumerate(results["training"]):
        mean = sum(task["stages"][stage] for task in results["tasks"].values()) / len(results["tasks"])
        rows.append([str(stage), f"{one['steps']:,}", f"{one['samples']:,}", f"{one['minutes']:.0f}", _percent(mean)])
    return _markdown(rows)


def checks(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """What must hold beside the scores."""
    rows = [["check", "wanted", "found"]]
    if _known(tasks, "second"):
        means = _mean(tasks, "score"), _mean(tasks, "second")
        rows.append(["mean score, this seed and another", "at most 5 points apart", " and ".join(map(_percent, means))])
    if seen := _known(tasks, "blind"):
        worst = max(seen, key=lambda name: seen[name]["blind"] - seen[name]["majority"])
        excess = seen[worst]["blind"] - seen[worst]["majority"]
        what = "another question's media: most above the constant answer"
        rows.append([what, "at most 5 points", f"{_percent(excess)} ({worst.partition('/')[2]})"])
    if moving := _known(tasks, "unpruned"):
        means = _mean(moving, "score"), _mean(moving, "unpruned")
        rows.append(
            ["mean score of clips, pruned and not", "pruning costs at most 1 point", " and ".join(map(_percent, means))]
        )
    if STILL in tasks:
        gone = f"{_percent(1 - tasks[STILL]['kept'])} %"
        rows.append(["vision tokens pruned from nearly still clips", "at least 50 %", gone])
    return _markdown(rows)


def questions() -> tuple[dict[str, Any], str]:
    """The first held-out question of each task, and their table."""
    chosen = QuestionSelection()
    drawn = {name: example(name, chosen.split, chosen.seed, 0) for name in JUDGED}
    rows = [["task", "question", "answer"]]
    for name, one in drawn.items():
        said = ", ".join(f"{text} ({time:.0f} s)" for role, text, time in one.said if role == "assistant")
        rows.append([name, one.question, f"`{said or one.answer}`"])
    return drawn, _markdown(rows)


def fill(path: pathlib.Path, parts: Mapping[str, str]) -> None:
    """Puts parts of a page between their marks; what is between others stays as it is."""
    text = path.read_text(encoding="utf-8")

    def put(match: re.Match) -> str:
        return f"{match[1]}{parts[match[2]]}\n{match[3]}" if match[2] in parts else match[0]

    path.write_text(_PLACE.sub(put, text), encoding="utf-8")


def _scores(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads((folder / "scores.json").read_text(encoding="utf-8"))["tasks"]
    except (OSError, ValueError, KeyError):
        raise InputError(f"{folder}: no scores; run launch/nano/train.py to its end") from None


def _training(workdir: pathlib.Path) -> dict[str, float]:
    """Steps, samples and minutes, added up from the reports."""
    samples = seconds = step = 0
    for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        report = json.loads(line)
        if "seconds/step" in report:
            took = report["seconds/step"] * (report["step"] - step)
            step, seconds, samples = report["step"], seconds + took, samples + took * report["samples/s"]
    return {"steps": step, "samples": round(samples), "minutes": round(seconds / 60, 1)}


def _known(tasks: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Mapping[str, Any]]:
    """The tasks of which something is known."""
    return {name: one for name, one in tasks.items() if key in one}


def _mean(tasks: Mapping[str, Mapping[str, Any]], key: str) -> float:
    found = [one[key] for one in tasks.values() if key in one]
    return sum(found) / len(found)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=pathlib.Path, metavar="DIR", help="of train.py")
    parser.add_argument("--second", type=pathlib.Path, metavar="DIR", help="of train.py with another --seed")
    parser.add_argument("--goals", type=pathlib.Path, metavar="FILE", help="scores to be reached, JSON")
    parser.add_argument("--root", type=pathlib.Path, default=ROOT, metavar="DIR", help="of README.md and docs")
    given = parser.parse_args(argv)
    home = given.root / "docs" / FIGURES
    try:
        goals = json.loads(given.goals.read_text(encoding="utf-8")) if given.goals else {}
        results = collect(given.runs, given.second, goals) if given.runs else None
        import figures
    except (InputError, OSError, ValueError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"report.py: {error}; pip install 'vl3_jax[bench]'", file=sys.stderr)
        return 2
    home.mkdir(parents=True, exist_ok=True)
    drawn, table = questions()
    parts = {"questions": table}
    figures.examples(drawn, home / "questions.png")
    if results:
        (home / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        tasks = results["tasks"]
        parts |= {"accuracy": accuracy(tasks), "training": training(results), "checks": checks(tasks)}
        figures.losses([figures.reports(given.runs / f"nano{stage}") for stage in STAGES], home / "loss.png")
        parts["loss"] = f"![Loss of each task over all stages]({FIGURES}/loss.png)"
        figures.scores(tasks, home / "stages.png")
        parts["stages"] = f"![Scores after each stage]({FIGURES}/stages.png)"
    for path in (given.root / "README.md", given.root / "docs" / "nano.md"):
        fill(path, parts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
