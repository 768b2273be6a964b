"""GQA: questions about the objects of a scene and how they relate."""

from collections.abc import Mapping
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.evaluation.benchmark import Benchmark, Item, PaperRow, Scoring, Verdict

_ANSWERS = "testdev_balanced_questions.json"


class GQA(Benchmark):
    """Exact match, ignoring case and full stops at the ends."""

    name, title, kind, size = "GQA", "GQA", "image", 12578
    rows = (PaperRow("GQA"),)
    source = "cs.stanford.edu/people/dorarad/gqa; question file of the LLaVA evaluation"
    layout = "llava_gqa_testdev_balanced.jsonl\ndata/testdev_balanced_questions.json\ndata/images/"
    licence = "CC BY 4.0"

    def items(self, data):
        answers, items = data.json("data", _ANSWERS), []
        for row in data.json_lines("llava_gqa_testdev_balanced.jsonl"):
            number = str(row["question_id"])
            if number not in answers:
                raise InputError(f"{data.path('data', _ANSWERS)}: no question {number}; download it again")
            reference = {"target": answers[number]["answer"].lower(), "task_type": row["category"]}
            image = {"type": "image", "image": data.path("data", "images", row["image"])}
            items.append(Item(number, [image], row["text"], reference))
        return items

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        parsed = response.strip().strip(".").lower()
        return Verdict(float(parsed == str(reference["target"]).lower()), parsed)
