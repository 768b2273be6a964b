"""MMMU-Pro: MMMU with ten options, and with the question inside of the picture."""

from collections.abc import Mapping
from typing import Any

from vl3_jax.evaluation.benchmark import (
    ORIGINAL,
    OVERALL,
    Benchmark,
    Item,
    PaperRow,
    Scoring,
    Verdict,
    accuracies,
    grouped,
)
from vl3_jax.evaluation.benchmarks.mmmu import interleaved_item, option_lines, parse_options
from vl3_jax.evaluation.scorers.choice_candidates import parse_choice, parse_choice_pro

_DIRECT = "Answer with the option letter from the given choices directly."
_FORMAT = (
    "The last line of your response should be of the following format: 'Answer: $LETTER' (without quotes) where LETTER "
    "is one of options."
)


class MMMUPro(Benchmark):
    """Accuracy on the questions with ten options; those inside of pictures are reported beside it if they are there."""

    name, title, kind, size = "MMMU_Pro", "MMMU-Pro", "image", 1730
    rows = (PaperRow("MMMU-Pro"),)
    variants = (ORIGINAL,)
    source = "huggingface.co/datasets/MMMU/MMMU_Pro; its `standard (10 options)` as `standard`, optionally `vision`"
    layout = "standard/test-*.parquet\nvision/test-*.parquet, if the questions inside of pictures are asked too"
    licence = "Apache-2.0; the pictures come from the web and from textbooks, research use"

    def items(self, data):
        items = []
        published = "standard (10 options)"
        for row in data.split("test", published if data.exists(published) else "standard"):
            options = parse_options(row["options"])
            text = f"{row['question']}\n{option_lines(options)}{_DIRECT}"
            items.append(interleaved_item(row, text, _reference(row, options, "standard")))
        for row in data.split("test", "vision") if data.exists("vision") else []:
            image = {"type": "image", "image": row["image"]}
            reference = _reference(row, parse_options(row["options"]), "vision")
            items.append(Item(f"vision/{row['id']}", [image], f"{_DIRECT} {_FORMAT}", reference))
        return items

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        options = reference.get("options") or []
        original = scoring.variant == ORIGINAL or (reference.get("setting") == "vision" and not scoring.official)
        letter = parse_choice_pro(response, options) if original else parse_choice(response, options)
        return Verdict(float(letter == reference["target"]), letter)

    def metrics(self, answers):
        return accuracies([answer for answer in answers if answer.reference.get("setting") != "vision"])

    def details(self, answers):
        vision = grouped(answers, "setting").get("vision")
        if not vision:
            return super().details(answers)
        overall = {"standard": self.metrics(answers)[OVERALL], "vision": accuracies(vision)[OVERALL]}
        return super().details(answers) | overall | {"mean of standard and vision": sum(overall.values()) / 2}


def _reference(row: Mapping[str, Any], options: list[str], setting: str) -> dict[str, Any]:
    return {"target": row["answer"], "task_type": row["subject"], "options": options, "setting": setting}
