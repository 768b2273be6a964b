"""RealWorldQA: questions about photographs, many of them taken from cars."""

from collections.abc import Mapping
from typing import Any

from vl3_jax.evaluation.benchmark import ORIGINAL, Benchmark, Item, PaperRow, Scoring, Verdict
from vl3_jax.evaluation.scorers.unparsed import UnparsedError


class RealWorldQA(Benchmark):
    """Exact match, ignoring case and a full stop."""

    name, title, kind, size = "RealWorldQA", "RealWorldQA", "image", 765
    rows = (PaperRow("RealWorldQA"),)
    judge_prompts = ("RealWorldQA",)
    source = "huggingface.co/datasets/xai-org/RealworldQA"
    layout = "test-*.parquet, here or in data/"
    licence = "CC BY-ND 4.0"

    def items(self, data):
        return [
            Item(
                str(number),
                [{"type": "image", "image": row["image"]}],
                row["question"],
                {"target": row["answer"].strip().lower(), "task_type": "test"},
            )
            for number, row in enumerate(data.split("test"))
        ]

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        parsed, target = response.strip().lower(), str(reference["target"]).strip().lower()
        if not parsed:
            raise UnparsedError("IndexError")
        parsed = parsed.removesuffix(".")
        if parsed == target:
            return Verdict(1.0, parsed)
        reply = "" if scoring.variant == ORIGINAL else scoring.ask("RealWorldQA", target=target, prediction=parsed)
        return Verdict(float("true" in reply.lower()), parsed)
