"""MATH-Vision: competition problems with pictures."""

from collections.abc import Mapping
from typing import Any

from vl3_jax.evaluation.benchmark import Benchmark, Item, PaperRow, Scoring, Verdict
from vl3_jax.evaluation.benchmarks.choice_video import lettered
from vl3_jax.evaluation.scorers import math_answer
from vl3_jax.evaluation.scorers.letters import letters_of

_PROMPT = (
    'Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a multiple choice '
    'question, only one letter is allowed in the "\\boxed{}".\n'
)


class MathVision(Benchmark):
    """Accuracy of the extracted answer or of the text of its option."""

    name, title, kind, size = "MathVision", "MathVision", "image", 3040
    rows = (PaperRow("MathVision test"),)
    source = "huggingface.co/datasets/MathLLMs/MathVision"
    layout = "test.jsonl\nthe images that its `image` names, from this folder on"
    licence = "MIT; the problems come from competitions, research use"

    def items(self, data):
        items = []
        for row in data.json_lines("test.jsonl"):
            options = row["options"]
            lines = "" if options == list("ABCDE") else lettered(options)
            reference = {"target": row["answer"], "task_type": row["subject"], "options": options}
            reference["level"] = row.get("level")
            image = {"type": "image", "image": data.path(row["image"])}
            items.append(Item(str(row["id"]), [image], f"{_PROMPT}{row['question']}\n{lines}", reference))
        return items

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        target, options = str(reference["target"]), reference.get("options") or []
        accepted = [target]
        if len(target) == 1 and target in letters_of(len(options)):
            accepted.append(str(options[ord(target) - ord("A")]))
        answer = math_answer.extract(response)
        equal = any(math_answer.equal_texts(answer, text) for text in accepted)
        if not equal and not scoring.official:
            equal = any(math_answer.equal_numbers(answer, text) for text in accepted)
        return Verdict(float(equal), answer)
