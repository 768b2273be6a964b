"""Scores vectors: lines with a response, its reference and the score that is expected, without a model.

A vector is `{"benchmark", "prediction", "target", "extra", "score"}`. `extra` has what the benchmark needs besides the
target, and these keys: `kind` ("item" or "aggregate"), `variant`, `judge` (the reply of a judge), `fixed_score` (where
it differs from the official `score`), `official_random_fallback`. A score of null means that the official code fails. A
file may hold vectors of prompts too (`vl3_jax.evaluation.prompt_vectors`).
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from vl3_jax.errors import InputError, printable
from vl3_jax.evaluation import benchmarks, prompt_vectors
from vl3_jax.evaluation.benchmark import HARNESS, Benchmark, ScoredAnswer, Scoring, Verdict

_TOLERANCE = 1e-6
_KEYS = ("benchmark", "prediction", "target", "score")
# What a report adds to the metrics, and the name of its expected value in the vector.
_DETAILS = {"task_macro": "Macro", "m_avg_macro": "Macro"}


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """A vector that does not reproduce.

    Attributes:
      vector: Its id, or its place in the file.
      message: What is expected and what came.
    """

    vector: str
    message: str


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads the vectors of a file.

    Raises:
      InputError: The file cannot be read, or a line is no vector.
    """
    try:
        lines = pathlib.Path(path).read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; give a file of vectors, one JSON object a line") from None
    vectors = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            vectors.append(_parse(line, f"{path}, line {number}"))
    if not vectors:
        raise InputError(f"{path}: holds no vectors; give a file with one JSON object a line")
    return vectors


def check(vectors: list[dict[str, Any]], official: bool) -> Iterator[Mismatch]:
    """Yields the vectors that do not reproduce.

    Args:
      vectors: The vectors.
      official: Whether to compare the official form of the scores; otherwise the corrected one, where there is one.

    Raises:
      InputError: A vector names an unknown benchmark, or lacks what its benchmark needs.
    """
    prompts = [vector for vector in vectors if "raw" in vector]
    yield from (Mismatch(*difference) for difference in prompt_vectors.check(prompts))
    for number, vector in enumerate(vectors, start=1):
        if "raw" in vector:
            continue
        extra = vector["extra"]
        where = str(extra.get("id") or f"vector {number}")
        (benchmark,) = benchmarks.find([vector["benchmark"]])
        try:
            message = _compare(benchmark, vector, official)
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise InputError(f"{where}: lacks what {benchmark.name} needs ({error!r}); correct the vector") from None
        if message:
            yield Mismatch(where, message)


def _compare(benchmark: Benchmark, vector: Mapping[str, Any], official: bool) -> str | None:
    extra = vector["extra"]
    if extra.get("kind") == "aggregate":
        rows = zip(vector["prediction"], vector["target"], extra["samples"], strict=True)
        answers = []
        for prediction, target, sample in rows:
            reference = {**sample, "target": target}
            answers.append(ScoredAnswer(_verdict(benchmark, prediction, reference, extra, official=True), reference))
        details = benchmark.details(answers)
        expected = {**vector["score"], **{key: extra[key] for key in _DETAILS if key in extra}}
        got = benchmark.metrics(answers) | {key: details.get(_DETAILS[key]) for key in _DETAILS if key in extra}
        return None if _equal(expected, got) else f"expected {json.dumps(expected)}, got {json.dumps(got)}"
    if official and extra.get("official_random_fallback"):
        return None  # the official code draws an answer
    reference = {**extra, "target": vector["target"]}
    verdict = _verdict(benchmark, vector["prediction"], reference, extra, official)
    expected = vector["score"] if official else extra.get("fixed_score", vector["score"])
    got: Any = verdict.score if verdict.rating is None else {"match": verdict.score, "score": verdict.rating}
    if expected is None:
        wrong = verdict.score != 0 or (official and verdict.unparsed is None)
    else:
        wrong = not _equal(expected, got)
    shown = f"expected {json.dumps(expected)}, got {json.dumps(got)} ({json.dumps(verdict.parsed)} was read)"
    return f"{shown} out of {printable(vector['prediction'])!r}" if wrong else None


def _verdict(
    benchmark: Benchmark, prediction: str, reference: Mapping[str, Any], extra: Mapping[str, Any], official: bool
) -> Verdict:
    reply = reference.get("judge")
    if isinstance(reply, bool):
        reply = json.dumps({"extracted_answer": prediction, "correct": reply})
    judge = None if reply is None else (lambda name, fields: reply)
    return benchmark.score(prediction, reference, Scoring(official, extra.get("variant", HARNESS), judge))


def _equal(expected: Any, got: Any) -> bool:
    if isinstance(expected, dict):
        return isinstance(got, dict) and expected.keys() == got.keys() and all(_equal(expected[k], got[k]) for k in got)
    if isinstance(expected, int | float) and isinstance(got, int | float):
        return math.isclose(expected, got, rel_tol=0, abs_tol=_TOLERANCE)
    return expected == got


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        vector = json.loads(line)
        required = prompt_vectors.KEYS if "raw" in vector else _KEYS
        complete = all(key in vector for key in required) and isinstance(vector.setdefault("extra", {}), dict)
    except (ValueError, TypeError, AttributeError, RecursionError):
        complete = False
    if not complete:
        raise InputError(f"{where}: not a vector, a JSON object with {', '.join(_KEYS)} and extra; correct the line")
    return vector
