"""Charades-STA: when something happens in a video."""

from collections.abc import Mapping
from typing import Any

from vl3_jax.evaluation.benchmark import Benchmark, Item, PaperRow, Scoring, Verdict, percent
from vl3_jax.evaluation.scorers.intervals import find_intervals, temporal_iou

_THRESHOLDS = (0.3, 0.5, 0.7)


class CharadesSTA(Benchmark):
    """Mean temporal intersection over union, and recall at three thresholds."""

    name, title, kind, size = "charades_sta", "Charades-STA", "video", 3720
    rows = (PaperRow("Charades-STA", ("mIoU",)),)
    source = (
        "huggingface.co/datasets/wangyueqian/MMDuetIT, charades/annotations/test-random_prompt.json, renamed; "
        "videos of prior.allenai.org/projects/charades"
    )
    layout = "charades_annotations_test-random_prompt.json\nCharades_v1/{video}"
    licence = "Charades: non-commercial use"

    def items(self, data):
        return [
            Item(
                str(row["question_id"]),
                [{"type": "video", "video": data.path("Charades_v1", row["video"])}],
                f"{row['conversation'][0]['content']}Please output the start and end timestamps in seconds.",
                {"target": row["timestamps"][0], "task_type": None},
            )
            for row in data.json("charades_annotations_test-random_prompt.json")
        ]

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        spans = find_intervals(response)
        iou = temporal_iou(spans, reference["target"], merge=not scoring.official)
        return Verdict(iou, [list(span) for span in spans], None if spans else "no interval")

    def metrics(self, answers):
        recalls = {
            f"R1@{threshold}": 100 * sum(answer.score >= threshold for answer in answers) / max(len(answers), 1)
            for threshold in _THRESHOLDS
        }
        return {"mIoU": percent(answers)} | recalls

    def details(self, answers):
        return {}
