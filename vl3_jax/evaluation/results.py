"""Results of benchmarks: scores answers, and counts what is missing or could not be read."""

import contextlib
import dataclasses
import json
import logging
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.evaluation import benchmarks
from vl3_jax.evaluation.benchmark import HARNESS, OFFLINE, Benchmark, Item, ScoredAnswer, Scoring, Verdict
from vl3_jax.evaluation.judges import JudgeError
from vl3_jax.evaluation.submission_files import SubmissionFiles
from vl3_jax.storage.durable import atomic_write

logger = logging.getLogger(__name__)

RESULTS, SAMPLES, SUBMISSION = "results.json", "samples.jsonl", "submission"


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The result of one benchmark.

    Attributes:
      summary: What `results.json` holds of it.
      samples: The answers with their scores, in the form of `samples.jsonl`.
      submission: What the benchmark's server takes, a JSON value or files, or None.
    """

    summary: dict[str, Any]
    samples: list[dict[str, Any]]
    submission: Any = None

    @property
    def missing(self) -> int:
        """The number of samples without a valid answer."""
        return sum(self.summary[name] for name in ("n_missing", "n_error", "n_missing_media"))


def answer_record(task: str, item: Item, answer: Any, **others: Any) -> dict[str, Any]:
    """Returns a line of an answer file.

    Args:
      task: Name of the task, `Benchmark.task`.
      item: The question.
      answer: The response, for a live stream a list; None if there is none, and then `error` says why.
      **others: Further JSON values.
    """
    media = [{key: _as_json(value) for key, value in part.items()} for part in item.media]
    record = {"id": f"{task}/{item.id}", "task": task, "question": item.text, "answer": answer}
    return record | {"reference": dict(item.reference), "media": media} | others


def score_tasks(
    records: Iterable[Mapping[str, Any]],
    scoring: Scoring,
    items: Mapping[str, Sequence[Item]] | None = None,
    judge_threads: int = 1,
) -> dict[str, TaskResult]:
    """Scores answers.

    Args:
      records: Lines of an answer file: "id", "task", "answer" and, unless `items` has it, "reference".
      scoring: How to score.
      items: All items of each task, to find references and what has no answer.
      judge_threads: Number of questions that a judge answers at a time.

    Returns:
      The result of each task.

    Raises:
      InputError: There are no answers, a task is unknown, or an answer has no reference.
    """
    by_task: dict[str, dict[str, Mapping[str, Any]]] = {task: {} for task in items or {}}
    for record in records:
        answers = by_task.setdefault(record["task"], {})
        if record["id"] in answers:
            logger.warning("%s is answered more than once; the last answer counts", record["id"])
        answers[record["id"]] = record
    if not by_task:
        raise InputError("there are no answers to score")
    results = {}
    for task, answers in by_task.items():
        (benchmark,) = benchmarks.find([task])
        results[task] = _score_task(benchmark, answers, scoring, (items or {}).get(task), judge_threads)
    return results


def save(results: Mapping[str, TaskResult], folder: pathlib.Path, protocol: Mapping[str, Any] | None) -> dict[str, Any]:
    """Writes `results.json`, `samples.jsonl` and submissions, and returns the content of the first.

    Args:
      results: Result of each task.
      folder: Folder to write to.
      protocol: What the model was asked with; None if it is not known.

    Raises:
      InputError: The folder cannot be written.
    """
    content = {"protocol": protocol, "tasks": {task: result.summary for task, result in results.items()}}
    samples = [sample for result in results.values() for sample in result.samples]
    write(folder / RESULTS, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write(folder / SAMPLES, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))
    for task, result in results.items():
        path = folder / f"{task.replace('@', '-')}.{SUBMISSION}"
        if isinstance(result.submission, SubmissionFiles):
            with _writing(path.with_name(f"{path.name}.zip")) as archive:
                result.submission.write(archive)
        elif result.submission is not None:
            text = json.dumps(result.submission, indent=1, ensure_ascii=False)
            write(path.with_name(f"{path.name}.json"), text + "\n")
    return content


def write(path: pathlib.Path, text: str) -> None:
    """Writes a file of the results, whole or not at all, and its folder if it is not there.

    Raises:
      InputError: It cannot be written.
    """
    with _writing(path):
        atomic_write(path, text.encode(errors="backslashreplace"))


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Makes the folder of a file that is written, and raises InputError if either cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; choose a folder that can be written") from None


def _score_task(
    benchmark: Benchmark,
    records: Mapping[str, Mapping[str, Any]],
    scoring: Scoring,
    items: Sequence[Item] | None,
    judge_threads: int,
) -> TaskResult:
    known = {f"{benchmark.task}/{item.id}": item for item in items or ()}
    strangers = records.keys() - known.keys()
    if items is not None and strangers:
        logger.warning("%d answers are to no item of %s, as %s", len(strangers), benchmark.task, min(strangers))
    references = {id_: _reference(record, known.get(id_)) for id_, record in records.items()}
    effective = benchmark.effective(scoring)

    def judge(id_: str) -> Verdict | JudgeError:
        try:
            return _verdict(benchmark, records[id_], references[id_], effective)
        except JudgeError as error:
            return error

    # In the order of the items, whatever that of the file: sums of floats and ties depend on it.
    places = {id_: place for place, id_ in enumerate(known)}
    order = sorted(records, key=lambda id_: (places.get(id_, len(places)), id_))
    scored_ids = [id_ for id_ in order if references[id_].get("target") is not None]
    with ThreadPoolExecutor(judge_threads if effective.judge else 1) as pool:
        verdicts = dict(zip(scored_ids, pool.map(judge, scored_ids), strict=True))
    answers = [ScoredAnswer(v, references[id_]) for id_, v in verdicts.items() if isinstance(v, Verdict)]
    prefix = f"{benchmark.task}/"
    responses = {id_.removeprefix(prefix): _response(record) for id_, record in records.items() if record["answer"]}
    described = {id_: answer_record(benchmark.task, item, None) for id_, item in known.items()}
    samples = [_sample({**described.get(id_, {}), **record}, verdicts.get(id_)) for id_, record in records.items()]
    counts = {
        "n": len(answers),
        "n_unscored": len(records) - len(scored_ids),
        "n_unparsed": sum(answer.verdict.unparsed not in (None, OFFLINE) for answer in answers),
        "n_error": sum(_failed(sample) and not sample.get("missing_media") for sample in samples),
        "n_missing_media": sum(bool(sample.get("missing_media")) for sample in samples),
        "n_missing": len(known.keys() - records.keys()),
        "n_usual": benchmark.size if benchmark.split == benchmark.splits[0] else 0,
    }
    metrics = benchmark.metrics(answers) if answers else {}
    details = benchmark.details(answers) if answers else {}
    values = {row.name: _value({**details, **metrics}, row.path) for row in benchmark.rows}
    headline = {name: value for name, value in values.items() if value is not None}
    summary = {
        **{"benchmark": benchmark.name, "title": benchmark.title, "kind": benchmark.kind, "split": benchmark.split},
        **{"headline": headline, "metrics": metrics, "details": details},
        "variants": _variants(benchmark, records, references, scored_ids),
        **{"scoring": "official" if scoring.official else "corrected", "variant": effective.variant},
        "judge": _judge_used(benchmark, effective),
        **counts,
        "kept": _kept(records.values()),
    }
    hidden = benchmark.submission and counts["n_unscored"] > 0
    return TaskResult(summary, samples, benchmark.submit(responses, items) if hidden and items is not None else None)


def _verdict(
    benchmark: Benchmark, record: Mapping[str, Any], reference: Mapping[str, Any], scoring: Scoring
) -> Verdict:
    if record.get("missing_media") or record["answer"] is None:
        return Verdict(0.0, unparsed="missing media" if record.get("missing_media") else "no answer")
    try:
        return benchmark.score(_response(record), reference, scoring)
    except InputError as error:
        raise InputError(f"{record['id']}: {error}") from None
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise InputError(f"{record['id']}: the reference is not of {benchmark.name} ({error!r}); correct it") from None


def _response(record: Mapping[str, Any]) -> Any:
    """Returns an answer: a text, the words of a live stream, or masks."""
    return record["answer"] if isinstance(record["answer"], list | dict) else str(record["answer"])


def _kept(records: Iterable[Mapping[str, Any]]) -> float | None:
    """Returns the share of vision tokens that pruning has left; None where there are none, or no counts of them."""
    records = list(records)
    before = sum(record.get("visual_tokens_before_pruning") or 0 for record in records)
    return sum(record.get("visual_tokens") or 0 for record in records) / before if before else None


def _failed(sample: Mapping[str, Any]) -> bool:
    return "error" in sample or sample["answer"] is None


def _judge_used(benchmark: Benchmark, scoring: Scoring) -> str:
    if scoring.variant == OFFLINE:
        return "none: offline rules, not comparable with judged scores"
    return "asked" if scoring.judge is not None and benchmark.judge_prompts else "none"


def _variants(
    benchmark: Benchmark,
    records: Mapping[str, Mapping[str, Any]],
    references: Mapping[str, Mapping[str, Any]],
    ids: Sequence[str],
) -> dict[str, Any]:
    """Returns the metrics of the other variants of scoring, the official form of the default one among them."""
    variants = {name: Scoring(variant=name) for name in benchmark.variants}
    if benchmark.name in benchmarks.BENCHMARKS and not benchmark.judge_prompts:
        variants["official"] = Scoring(True, HARNESS)
    results = {}
    for name, scoring in variants.items():
        verdicts = {id_: _verdict(benchmark, records[id_], references[id_], scoring) for id_ in ids}
        answers = [ScoredAnswer(verdict, references[id_]) for id_, verdict in verdicts.items()]
        results[name] = benchmark.metrics(answers) if answers else {}
    return results


def _reference(record: Mapping[str, Any], item: Item | None) -> Mapping[str, Any]:
    reference = record.get("reference") or (item.reference if item else None)
    if not isinstance(reference, Mapping) or "target" not in reference:
        raise InputError(f"{record['id']}: the answer has no reference; give --data, the folder of all benchmarks")
    return reference


def _sample(record: Mapping[str, Any], verdict: Verdict | JudgeError | None) -> dict[str, Any]:
    sample = dict(record)
    if isinstance(verdict, JudgeError):
        sample["error"] = str(verdict)
    elif verdict is not None:
        sample |= {"score": verdict.score, "parsed": verdict.parsed}
        sample |= {"unparsed": verdict.unparsed} if verdict.unparsed is not None else {}
        sample |= {"rating": verdict.rating} if verdict.rating is not None else {}
    return sample


def _as_json(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _value(metrics: Mapping[str, Any], path: Sequence[str]) -> float | None:
    value: Any = metrics
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, float | int) else None
