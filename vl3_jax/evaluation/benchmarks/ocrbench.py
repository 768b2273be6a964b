"""OCRBench: reading text, formulas, scenes and forms."""

from collections.abc import Mapping
from typing import Any

from vl3_jax.evaluation.benchmark import OVERALL, Benchmark, Item, PaperRow, Scoring, Verdict, grouped
from vl3_jax.evaluation.benchmarks.docvqa import PROMPT

_FORMULAS = "HME100k"  # formulas keep their case, and blanks in them do not count
_TEXT_RECOGNITION = (
    *("Regular Text Recognition", "Irregular Text Recognition", "Artistic Text Recognition"),
    *("Handwriting Recognition", "Digit String Recognition", "Non-Semantic Text Recognition"),
)


class OCRBench(Benchmark):
    """The number of answers that hold an accepted text."""

    name, title, kind, size = "OCRBench", "OCRBench", "image", 1000
    rows = (PaperRow("OCRBench"), PaperRow("OCR Bench"))
    source = "github.com/Yuliang-Liu/MultimodalOCR"
    layout = "OCRBench.json\nOCRBench_Images/"
    licence = "MIT for the questions; the images keep the terms of their data sets, mostly research use"

    def items(self, data):
        return [
            Item(
                str(row["id"]),
                [{"type": "image", "image": data.path("OCRBench_Images", row["image_path"])}],
                PROMPT.format_map(row),
                {"target": row["answers"], "task_type": row["type"], "dataset_name": row["dataset_name"]},
            )
            for row in data.json("OCRBench.json")
        ]

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        target = reference["target"]
        answers = target if isinstance(target, list) else [target]
        plain = _formula if reference.get("dataset_name") == _FORMULAS else _text
        prediction = plain(response)
        return Verdict(float(any(plain(str(answer)) in prediction for answer in answers)), prediction)

    def metrics(self, answers):
        counts = {name: sum(answer.score for answer in group) for name, group in grouped(answers, "task_type").items()}
        return counts | {OVERALL: sum(answer.score for answer in answers)}

    def details(self, answers):
        counts = self.metrics(answers)
        return {"Text Recognition": sum(counts.get(name, 0.0) for name in _TEXT_RECOGNITION)}


def _text(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")
