"""MathVista: mathematics in pictures."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vl3_jax.evaluation.benchmark import (
    OFFLINE,
    Benchmark,
    Item,
    PaperRow,
    Scoring,
    Verdict,
    accuracies,
    grouped,
    percent,
)
from vl3_jax.evaluation.scorers.letters import last_letter, letters_of, tail
from vl3_jax.evaluation.scorers.text_distance import levenshtein

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_GROUPS = ("source", "task", "grade", "skills")  # of the metadata


class MathVista(Benchmark):
    """Accuracy of the extracted and normalised answer; the judge extracts what rules do not find."""

    name, title, kind, size = "MathVista", "MathVista (testmini)", "image", 1000
    rows = (PaperRow("MathVista testmini"),)
    judge_prompts = ("MathVista",)
    source = "huggingface.co/datasets/AI4Math/MathVista; `query.json` maps each pid to the data set's `query`"
    layout = "testmini.json, query.json\nthe images that `image` names, from this folder on"
    licence = "CC BY-SA 4.0; for tests only, not for training; the images keep their own terms"

    def items(self, data):
        queries, items = data.json("query.json"), []
        for pid, row in data.json("testmini.json").items():
            reference = {"target": row["answer"], "task_type": row["question_type"], "options": row.get("choices")}
            reference |= {key: row.get(key) for key in ("question_type", "answer_type", "precision")}
            metadata = row.get("metadata") or {}
            reference |= {key: metadata[key] for key in _GROUPS if key in metadata} | {"query": queries[pid]}
            items.append(Item(pid, [{"type": "image", "image": data.path(row["image"])}], queries[pid], reference))
        return items

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        extraction = _extract(response.strip(), reference, scoring)
        answer = _normalised(extraction, reference)
        return Verdict(float(str(answer) == str(reference["target"])), extraction)

    def metrics(self, answers):
        return accuracies(answers, "question_type")

    def details(self, answers):
        groups = {key: grouped(answers, key) for key in _GROUPS}
        groups = {key: {name: percent(group) for name, group in groups[key].items()} for key in _GROUPS if groups[key]}
        return super().details(answers) | groups


def _extract(response: str, reference: Mapping[str, Any], scoring: Scoring) -> str:
    options, answer_type = _options(reference), reference.get("answer_type")
    if not response or (reference.get("question_type") == "multi_choice" and response in options):
        return response
    try:
        if answer_type == "integer":
            return str(int(response))
        if answer_type == "float":
            return str(float(response))
    except ValueError:
        pass
    quoted = re.search(r'The answer is "(.*)"\.', response)
    if quoted:
        return quoted.group(1)
    if scoring.variant != OFFLINE:
        return scoring.ask("MathVista", query=reference.get("query", ""), response=response)
    return _extract_offline(tail(response), reference, options)


def _extract_offline(text: str, reference: Mapping[str, Any], options: Sequence[str]) -> str:
    if reference.get("question_type") == "multi_choice":
        contained = [option for option in options if option.lower() in text.lower()]
        return last_letter(text, len(options)) or max(contained, key=len, default=text)
    if reference.get("answer_type") in ("integer", "float"):
        numbers = _NUMBER.findall(text)
        return numbers[-1].replace(",", "") if numbers else text
    if reference.get("answer_type") == "list":
        lists = re.findall(r"\[[^\[\]]*\]", text)
        return lists[-1] if lists else text
    return text


def _normalised(extraction: str, reference: Mapping[str, Any]) -> str | None:
    options = _options(reference)
    if reference.get("question_type") == "multi_choice":
        extraction = extraction.strip()
        lettered = re.search(r"\(([a-zA-Z])\)", extraction)
        extraction = lettered.group(1).upper() if lettered else extraction
        if len(extraction) == 1 and extraction in letters_of(len(options)):
            return options[letters_of(len(options)).index(extraction)]
        return min(options, key=lambda option: levenshtein(extraction, option), default=None)
    try:
        if reference.get("answer_type") == "integer":
            return str(int(float(extraction)))
        if reference.get("answer_type") == "float":
            return str(round(float(extraction), int(reference["precision"])))
    except (ValueError, TypeError, OverflowError, KeyError):
        return None
    return extraction


def _options(reference: Mapping[str, Any]) -> list[str]:
    return [str(option) for option in reference.get("options") or []]
