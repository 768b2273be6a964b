"""Perception Test: multiple choice about short, filmed scenes."""

from collections.abc import Mapping
from typing import Any

from vl3_jax.evaluation.benchmark import Benchmark, Item, PaperRow, Scoring, Verdict
from vl3_jax.evaluation.benchmarks.choice_video import choice_prompt
from vl3_jax.evaluation.scorers.letters import first_letter, without_answer_word
from vl3_jax.evaluation.scorers.unparsed import UnparsedError

_NUM_OPTIONS = 3


class PerceptionTest(Benchmark):
    """Accuracy by the challenge's server; on the split `valid` it is computed here."""

    name, title, kind, size = "perception_test", "Perception Test", "video", 0
    rows = (PaperRow("PerceptionTest test"),)
    splits = ("test", "valid")
    source = "github.com/google-deepmind/perception_test"
    layout = "mc_question_test.json (mc_question_valid.json for perception_test@valid)\nvideos/{video_id}.mp4"
    licence = "CC BY 4.0"
    submission = True

    def items(self, data):
        items = []
        for entry in data.json(f"mc_question_{self.split}.json").values():
            video = entry["metadata"]["video_id"]
            media = [{"type": "video", "video": data.video("videos", video)}]
            for row in entry["mc_question"]:
                options = row["options"]
                reference = {"target": row.get("answer_id"), "task_type": None, "options": options, "video": video}
                reference |= {"question_id": row["id"], "area": row.get("area"), "reasoning": row.get("reasoning")}
                items.append(Item(f"{video}_{row['id']}", media, choice_prompt(row["question"], options), reference))
        return items

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        index = first_letter(without_answer_word(response), _NUM_OPTIONS)
        if index is None:
            options = [str(option).lower() for option in reference.get("options") or []]
            if scoring.official or response.strip().lower() not in options:
                raise UnparsedError("NameError")
            index = options.index(response.strip().lower())
        return Verdict(float(index == reference["target"]), index)

    def submit(self, answers, items):
        submission: dict[str, list[dict[str, Any]]] = {}
        for item in items:
            index = self.score(answers.get(item.id, ""), {**item.reference, "target": -1}, Scoring()).parsed
            if index is not None:
                answer = {"id": item.reference["question_id"], "answer_id": index}
                answer["answer"] = item.reference["options"][index]
                submission.setdefault(item.reference["video"], []).append(answer)
        return submission
