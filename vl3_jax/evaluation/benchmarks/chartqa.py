"""ChartQA: short answers about charts."""

from collections.abc import Mapping
from typing import Any

from vl3_jax.evaluation.benchmark import (
    MACRO,
    ORIGINAL,
    OVERALL,
    Benchmark,
    Item,
    PaperRow,
    Scoring,
    Verdict,
    accuracies,
    mean,
    percent,
)
from vl3_jax.evaluation.scorers.relaxed_number import relaxed_match


class ChartQA(Benchmark):
    """Relaxed accuracy; the headline is the mean of the two halves."""

    name, title, kind, size = "ChartQA", "ChartQA", "image", 2500
    rows = (PaperRow("ChartQA"),)
    judge_prompts, variants = ("ChartQA",), (ORIGINAL,)
    source = "github.com/vis-nlp/ChartQA, with the question files of the OpenGVLab/InternVL evaluation, ids made unique"
    layout = (
        "test_augmented_renamed.jsonl, test_human_renamed.jsonl\n"
        "the images that their `image` names, from this folder on"
    )
    licence = "GPL-3.0"

    def items(self, data):
        items = []
        for half in ("augmented", "human"):
            for row in data.json_lines(f"test_{half}_renamed.jsonl"):
                text = f"{row['question']}\nAnswer the question using a single word or phrase."
                reference = {"target": row["answer"], "task_type": half, "question": row["question"]}
                image = {"type": "image", "image": data.path(row["image"])}
                items.append(Item(str(row["question_id"]), [image], text, reference))
        return items

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        target = reference["target"]
        targets = target if isinstance(target, list) else [target]
        prediction = response.strip()
        correct = any(_matches(prediction, str(target), reference, scoring) for target in targets)
        return Verdict(float(correct), prediction)

    def metrics(self, answers):
        halves = {name: value for name, value in accuracies(answers).items() if name != OVERALL}
        return halves | {OVERALL: mean(list(halves.values()))}

    def details(self, answers):
        return {MACRO: self.metrics(answers)[OVERALL], "Micro": percent(answers)}


def _matches(prediction: str, target: str, reference: Mapping[str, Any], scoring: Scoring) -> bool:
    original = scoring.variant == ORIGINAL
    close = relaxed_match(prediction, target, allow_factor_100=not original)
    if close is not None:
        return close
    if prediction.lower() == target.lower():
        return True
    if original:
        return False
    question = reference.get("question", "")
    return "true" in scoring.ask("ChartQA", question=question, target=target, prediction=prediction).lower()
