"""ActivityNet-QA: open questions about videos of activities, scored by a judge."""

import ast
from collections.abc import Mapping
from typing import Any

from vl3_jax.errors import InputError
from vl3_jax.evaluation.benchmark import (
    OFFLINE,
    ORIGINAL,
    Benchmark,
    Item,
    PaperRow,
    Scoring,
    Verdict,
    grouped,
    mean,
    percent,
)
from vl3_jax.evaluation.data_folder import VIDEO_ENDINGS
from vl3_jax.evaluation.scorers.open_answers import words_match
from vl3_jax.evaluation.scorers.unparsed import UnparsedError

_INSTRUCTION = "Please watch the video and answer the question clearly and concisely.\n"
_TYPES = ("Motion", "Spatial Relation", "Temporal Relation", "Yes/No", "Color", "Object", "Location", "Number", "Other")


class ActivityNetQA(Benchmark):
    """Share of answers that the judge accepts, and its mean rating."""

    name, title, kind, size = "activitynet_qa", "ActivityNet-QA", "video", 8000
    rows = (PaperRow("ActivityNet-QA", ("total",)),)
    judge_prompts = ("activitynet_qa",)
    source = "github.com/MILVLG/activitynet-qa; videos of activity-net.org"
    layout = "test_q.json, test_a.json\nall_test/v_{video_name}.mp4, .avi, .mov, .mkv or .webm"
    licence = "Apache-2.0 for the questions; videos on request, research use"

    def items(self, data):
        references, items = {row["question_id"]: row for row in data.json("test_a.json")}, []
        for number, row in enumerate(data.json("test_q.json")):
            answer = references.get(row["question_id"])
            if answer is None:
                raise InputError(f"{data.path('test_a.json')}: no answer to {row['question_id']}; download it again")
            text = f"Question: {row['question']}\n{_INSTRUCTION}"
            reference = {"target": answer["answer"], "task_type": answer["type"], "question": row["question"]}
            video = data.video("all_test", f"v_{row['video_name']}", endings=VIDEO_ENDINGS)
            items.append(Item(str(number), [{"type": "video", "video": video}], text, reference))
        return items

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        target = str(reference["target"])
        if scoring.variant == OFFLINE:
            return Verdict(float(words_match(response, target)))
        question = reference.get("question", "")
        reply = scoring.ask("activitynet_qa", question=question, target=target, response=response.strip())
        try:
            verdict = ast.literal_eval(reply)
            if scoring.variant == ORIGINAL:
                return Verdict(float("yes" in verdict["pred"]), verdict["pred"], rating=int(float(verdict["score"])))
            return Verdict(float(verdict["pred"] == "yes"), verdict["pred"], rating=float(verdict["score"]))
        except (ValueError, SyntaxError, TypeError, KeyError, IndexError, OverflowError, MemoryError, RecursionError):
            raise UnparsedError("the judge's reply is no verdict") from None

    def metrics(self, answers):
        ratings = [answer.verdict.rating for answer in answers if answer.verdict.rating is not None]
        return {"total": percent(answers)} | ({"total_score": mean(ratings)} if ratings else {})

    def details(self, answers):
        groups = grouped(answers, "task_type")
        return {name: percent(groups[str(number)]) for number, name in enumerate(_TYPES) if str(number) in groups}
