"""The parts of `vl3 eval` that need no model: vectors, scores of answers, the check of data."""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vl3_jax.cli import settings_flags
from vl3_jax.errors import InputError
from vl3_jax.evaluation import benchmarks
from vl3_jax.evaluation.benchmark import Item, Scoring
from vl3_jax.evaluation.judges import Judge, JudgeSettings

_JUDGE = {
    "url": "--judge",
    "model": "--judge-model",
    "key_variable": "--judge-key",
    "prompts": "--judge-prompts",
    "cache": "--judge-cache",
    "threads": "--judge-threads",
    "attempts": "--judge-attempts",
    "timeout": "--judge-timeout",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of benchmarks, their scores and their judge."""
    group = parser.add_argument_group("benchmarks")
    group.add_argument("--data", metavar="ROOT", help="folder of all benchmarks, each in a folder of its name")
    group.add_argument("--check-data", action="store_true", help="list what ROOT lacks for the --tasks, and stop")
    group.add_argument("--official-scoring", action="store_true", help="score as the official code, with its mistakes")
    group.add_argument("--vectors", metavar="FILE", help="check a file of responses or prompts with known results")
    judge = parser.add_argument_group(
        "judge", "a language model behind an OpenAI-compatible API; by default none is asked"
    )
    settings_flags.add(judge, JudgeSettings, _JUDGE, {"url": None, "model": None, "cache": "judge.jsonl in --out"})


def run_vectors(arguments: argparse.Namespace) -> int:
    """Prints each vector that does not reproduce, and how many do; returns 1 unless all do."""
    from vl3_jax.evaluation import vectors

    found = vectors.read(arguments.vectors)
    count = 0
    for mismatch in vectors.check(found, arguments.official_scoring):
        print(f"{mismatch.vector}: {mismatch.message}")
        count += 1
    print(f"{len(found) - count} of {len(found)} reproduce")
    return int(count > 0)


def run_check_data(arguments: argparse.Namespace) -> int:
    """Prints what the data of each benchmark lacks; returns 2 unless it is complete."""
    from vl3_jax.evaluation import data_check

    if not arguments.data:
        raise InputError("--check-data needs --data, the folder of all benchmarks")
    found = benchmarks.find(benchmarks.listed(arguments.tasks or "paper"))
    states = [data_check.check(benchmark, arguments.data) for benchmark in found]
    for line in data_check.report(states):
        print(line)
    incomplete = sum(not state.complete for state in states)
    print(f"{len(states) - incomplete} of {len(states)} complete")
    return 2 if incomplete else 0


def run_score_only(arguments: argparse.Namespace) -> None:
    """Scores the answers of a file, or of the folder of a run."""
    from vl3_jax.evaluation import answer_file

    if arguments.model:
        raise InputError("--score-only takes no --model; leave it out")
    if arguments.tasks and not arguments.data:
        raise InputError("--score-only takes --tasks only with --data; leave it out")
    source = pathlib.Path(arguments.score_only)
    records = answer_file.read(source)
    run = source if source.is_dir() else source.parent
    items = _items(arguments, records)
    if arguments.tasks:
        records = [record for record in records if record["task"] in items]
    score(arguments, records, pathlib.Path(arguments.out or run), items, _protocol(run))


def score(
    arguments: argparse.Namespace,
    records: Sequence[dict[str, Any]],
    folder: pathlib.Path,
    items: Mapping[str, Sequence[Item]],
    protocol: Mapping[str, Any] | None,
) -> None:
    """Scores answers, prints the tables and writes them with everything else.

    Args:
      arguments: The parsed flags.
      records: Lines of an answer file.
      folder: Folder for the results.
      items: All items of the tasks whose data is known.
      protocol: What the answers were asked with; None if it is not known.

    Raises:
      InputError: The answers cannot be scored, or, after everything is written, some are missing.
    """
    from vl3_jax.evaluation import result_tables, results, worst_page

    with _judge(arguments, folder) as judge:
        scoring = Scoring(official=arguments.official_scoring, judge=judge)
        threads = judge.settings.threads if judge else 1
        scored = results.score_tasks(records, scoring, items, threads)
    content = results.save(scored, folder, protocol)
    model = (content["protocol"] or {}).get("model") or "this model"
    results.write(folder / result_tables.MARKDOWN, result_tables.markdown(content, model))
    results.write(folder / result_tables.HTML, result_tables.as_html(content, model))
    worst_page.write((sample for result in scored.values() for sample in result.samples), folder)
    print(result_tables.as_text(content, model))
    incomplete = [f"{task}: {result.missing}" for task, result in scored.items() if result.missing]
    if incomplete:
        errors = [sample for result in scored.values() for sample in result.samples if sample.get("error")]
        reason = f"; {errors[0]['id']}: {errors[0]['error']}" if errors else ""
        raise InputError(
            f"samples without a valid answer ({', '.join(incomplete)}); answer them and score again{reason}"
        )


def _items(arguments: argparse.Namespace, records: Sequence[dict[str, Any]]) -> dict[str, list[Item]]:
    """Returns all items of the tasks whose data is given."""
    if not arguments.data:
        return {}
    tasks = (
        benchmarks.listed(arguments.tasks)
        if arguments.tasks
        else list(dict.fromkeys(record["task"] for record in records))
    )
    found = [benchmark for benchmark in benchmarks.find(tasks) if benchmark.needs_data]
    return {benchmark.task: benchmark.load(arguments.data) for benchmark in found}


def _protocol(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns what the answers were asked with, if the run that wrote them says so."""
    from vl3_jax.evaluation.answer_file import SETTINGS
    from vl3_jax.json_file import read_object

    path = folder / SETTINGS
    return dict(read_object(path)) if path.is_file() else None


@contextlib.contextmanager
def _judge(arguments: argparse.Namespace, folder: pathlib.Path) -> Iterator[Judge | None]:
    flags = vars(arguments)
    given = {name: flags[flag.removeprefix("--").replace("-", "_")] for name, flag in _JUDGE.items()}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        yield None
        return
    if "url" not in given or "model" not in given:
        raise InputError("a judge needs --judge with its URL and --judge-model")
    judge = Judge(JudgeSettings(**{"cache": str(folder / "judge.jsonl"), **given}))
    print(f"the judge {judge.settings.model} at {judge.settings.url} is asked", file=sys.stderr)
    with contextlib.closing(judge):
        yield judge
