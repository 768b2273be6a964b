"""BLINK: perception with one to four pictures."""

from collections.abc import Mapping, Sequence
from typing import Any

from vl3_jax.evaluation.benchmark import MACRO, OFFLINE, Benchmark, Item, PaperRow, Scoring, Verdict
from vl3_jax.evaluation.scorers.letters import last_letter, letters_of, tail

TASKS = (
    *("Art_Style", "Functional_Correspondence", "Multi-view_Reasoning", "Relative_Reflectance"),
    *("Visual_Correspondence", "Counting", "IQ_Test", "Object_Localization", "Semantic_Correspondence"),
    *("Visual_Similarity", "Forensic_Detection", "Jigsaw", "Relative_Depth", "Spatial_Relation"),
)
_LETTERS = "ABCDE"
_NO_OPTION = "(Z)"


class BLINK(Benchmark):
    """Accuracy; the headline is the mean over the tasks."""

    name, title, kind, size = "BLINK", "BLINK", "image", 1901
    splits = ("val", "test")
    rows = (PaperRow("BLINK test", (MACRO,)),)
    judge_prompts = ("BLINK",)
    source = "huggingface.co/datasets/BLINK-Benchmark/BLINK"
    layout = "{task}/val-*.parquet for each of the 14 tasks (test-*.parquet for BLINK@test)"
    licence = "Apache-2.0; the pictures keep the terms of their data sets"
    submission = True

    def items(self, data):
        items = []
        for task in data.groups(TASKS):
            for row in data.split(self.split, task):
                images = [row.get(f"image_{number}") for number in range(1, 5)]
                media = [{"type": "image", "image": image} for image in images if image is not None]
                text = f"{row['prompt']}\nAnswer with the option's letter from the given choices directly."
                target = None if row["answer"] in (None, "", "hidden") else row["answer"]
                reference = {"target": target, "task_type": task, "choices": row["choices"], "prompt": row["prompt"]}
                items.append(Item(row["idx"], media, text, reference))
        return items

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        choices = [str(choice) for choice in reference.get("choices") or []]
        parsed = _parse(response.strip(), choices, reference.get("prompt", ""), scoring)
        return Verdict(float(parsed == reference["target"]), parsed)

    def submit(self, answers, items):
        scoring = self.effective(Scoring())
        return {
            item.id: _parse(answers[item.id].strip(), item.reference["choices"], item.reference["prompt"], scoring)
            for item in items
            if item.id in answers
        }


def _parse(response: str, choices: Sequence[str], prompt: str, scoring: Scoring) -> str:
    if response in tuple(_LETTERS):
        return f"({response})"
    if response in [f"({letter})" for letter in _LETTERS]:
        return response
    signs = {f"({letter})" for letter in letters_of(len(choices))}
    for text in (response.split("\n\n")[-1], response):
        named = signs.intersection(text.split())
        if len(named) == 1:
            return named.pop()
    if scoring.variant == OFFLINE:
        return _parse_offline(response, choices)
    options = "\n".join(f"({letter}) {text}" for letter, text in zip(letters_of(len(choices)), choices, strict=False))
    return scoring.ask("BLINK", options=options, prompt=prompt, response=response)


def _parse_offline(response: str, choices: Sequence[str]) -> str:
    letter = last_letter(tail(response), len(choices))
    if letter:
        return f"({letter})"
    named = [index for index, choice in enumerate(choices) if choice.lower() in response.lower()]
    return f"({letters_of(len(choices))[named[0]]})" if len(named) == 1 else _NO_OPTION
