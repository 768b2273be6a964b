"""LVBench: multiple choice about videos of more than half an hour."""

import re
from collections.abc import Mapping
from typing import Any

from vl3_jax.evaluation.benchmark import Benchmark, Item, PaperRow, Scoring, Verdict
from vl3_jax.evaluation.scorers.unparsed import UnparsedError


class LVBench(Benchmark):
    """Accuracy of the first letter that is a word of its own."""

    name, title, kind, size = "lvbench", "LVBench", "video", 1549
    rows = (PaperRow("LVBench"),)
    source = "huggingface.co/datasets/THUDM/LVBench"
    layout = "video_info.meta.jsonl\nvideo/{key}.mp4"
    licence = "CC BY-NC-SA 4.0"

    def items(self, data):
        items = []
        for row in data.json_lines("video_info.meta.jsonl"):
            media = [{"type": "video", "video": data.video("video", row["key"])}]
            for question in row["qa"]:
                text = f"{question['question']}\nAnswer with the option's letter from the given choices directly."
                reference = {"target": question["answer"], "task_type": question["question_type"]}
                items.append(Item(str(question["uid"]), media, text, reference))
        return items

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        found = re.search(r"\b[A-D]\b", response.upper())
        if not found:
            raise UnparsedError("ValueError")
        return Verdict(float(found.group() == reference["target"]), found.group())
