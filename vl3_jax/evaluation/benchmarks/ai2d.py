"""AI2D: multiple choice about science diagrams."""

from collections.abc import Mapping
from typing import Any

from vl3_jax.evaluation.benchmark import ORIGINAL, Benchmark, Item, PaperRow, Scoring, Verdict
from vl3_jax.evaluation.scorers.letters import first_letter, strict_first_letter, without_answer_word

_NUM_OPTIONS = 4


class AI2D(Benchmark):
    """Accuracy of the first letter."""

    name, title, kind, size = "AI2D", "AI2D", "image", 3088
    rows = (PaperRow("AI2D"),)
    variants = (ORIGINAL,)
    source = "prior.allenai.org/projects/diagram-understanding; question file of the OpenGVLab/InternVL evaluation"
    layout = "ai2d_test_vlmevalkit.jsonl\nthe images that its `image` names, from this folder on"
    licence = "CC BY-SA 4.0"

    def items(self, data):
        return [
            Item(
                str(row["question_id"]),
                [{"type": "image", "image": data.path(row["image"])}],
                row["question"],
                {"target": ord(row["answer"]) - ord("A"), "task_type": "test"},
            )
            for row in data.json_lines("ai2d_test_vlmevalkit.jsonl")
        ]

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        if scoring.variant == ORIGINAL:
            letter = response.strip().upper()
            return Verdict(float(letter == chr(ord("A") + reference["target"])), letter)
        text = without_answer_word(response)
        if scoring.official:
            index = strict_first_letter(text, _NUM_OPTIONS, comma_wraps=False)
        else:
            index = first_letter(text, _NUM_OPTIONS)
        return Verdict(float(index == reference["target"]), index, None if index is not None else "no letter")
