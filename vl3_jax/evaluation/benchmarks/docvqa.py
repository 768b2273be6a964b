"""DocVQA: short answers about scanned documents."""

from collections.abc import Mapping
from typing import Any

from vl3_jax.evaluation.benchmark import (
    HARNESS,
    OVERALL,
    Benchmark,
    Item,
    PaperRow,
    Scoring,
    Verdict,
    accuracies,
    percent,
)
from vl3_jax.evaluation.scorers.text_distance import anls

_THRESHOLD = 0.5
PROMPT = "{question}\nAnswer the question with a single word or phrase."


class DocVQA(Benchmark):
    """ANLS."""

    name, title, kind, size = "DocVQA", "DocVQA", "image", 5349
    splits = ("val", "test")
    rows = (PaperRow("DocVQA test", ("val",)),)
    source = "www.docvqa.org (Robust Reading Competition), question files of the OpenGVLab/InternVL evaluation"
    layout = "val.jsonl (test.jsonl for DocVQA@test)\nthe images that its `image` names, from this folder on"
    licence = "registration at rrc.cvc.uab.es; research use"
    submission = True

    def items(self, data):
        return [
            Item(
                str(row["question_id"]),
                [{"type": "image", "image": data.path(row["image"])}],
                PROMPT.format_map(row),
                {"target": row.get("answer"), "task_type": self.split},
            )
            for row in data.json_lines(f"{self.split}.jsonl")
        ]

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        target = reference["target"]
        answers = [str(answer) for answer in target] if isinstance(target, list) else [str(target)]
        threshold = (
            0.0 if scoring.official and scoring.variant == HARNESS else reference.get("anls_threshold", _THRESHOLD)
        )
        return Verdict(anls(response, answers, threshold), response)

    def metrics(self, answers):
        return {name: value for name, value in accuracies(answers).items() if name != OVERALL}

    def details(self, answers):
        return {OVERALL: percent(answers)}

    def submit(self, answers, items):
        return [
            {"questionId": int(item.id) if item.id.isdecimal() else item.id, "answer": answers[item.id]}
            for item in items
            if item.id in answers
        ]
