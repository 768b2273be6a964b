"""TempCompass: what changes over time in a video, asked in four formats."""

import re
from collections.abc import Mapping
from typing import Any

from vl3_jax.evaluation.benchmark import (
    OFFLINE,
    OVERALL,
    Benchmark,
    Item,
    PaperRow,
    Scoring,
    Verdict,
    accuracies,
    grouped,
    mean,
)
from vl3_jax.evaluation.scorers.unparsed import UnparsedError

_CAPTIONING = "captioning"
_INSTRUCTIONS = {
    "yes_no": "Please answer with 'yes' or 'no' directly.",
    _CAPTIONING: "Please answer with the caption directly.",
    "caption_matching": "Please directly give the best option:",
    "multi-choice": (
        "Please answer with the option's letter from the given choices directly and only give the best option."
    ),
}


class TempCompass(Benchmark):
    """Accuracy over all formats; captions are compared by a judge and left out without one."""

    name, title, kind, size = "tempcompass", "TempCompass", "video", 7540
    rows = (PaperRow("TempCompass", ("total", OVERALL)),)
    judge_prompts = ("tempcompass_captioning",)
    source = "huggingface.co/datasets/lmms-lab/TempCompass"
    layout = (
        "test-00000-of-00001.parquet in each of yes_no/, captioning/, caption_matching/, multi-choice/\n"
        "videos/{video_id}.mp4"
    )
    licence = "research use; the videos come from ShutterStock and keep its terms"

    def items(self, data):
        items = []
        for form, instruction in _INSTRUCTIONS.items():
            for row in data.table(form, "test-00000-of-00001.parquet"):
                question = row["question"]
                shown = question.replace("Generated Caption:", "").strip() if form == _CAPTIONING else question
                reference = {"target": row["answer"], "task_type": row["dim"], "question_format": form}
                media = [{"type": "video", "video": data.path("videos", f"{row['video_id']}.mp4")}]
                text = f"Question: {shown}\n{instruction}"
                items.append(Item(str(len(items)), media, text, reference | {"question": question}))
        return items

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        response, target = response.strip(), str(reference["target"])
        said, form = response.lower(), reference["question_format"]
        if form == "yes_no":
            if "yes" not in said and "no" not in said:
                raise UnparsedError("AssertionError")
            correct = said.startswith(target.lower())
        elif form == "caption_matching":
            correct = _without_kind(said).startswith(_without_kind(target.split(":")[0].lower()))
        elif form == "multi-choice":
            correct = said.startswith(target.split(".")[0].lower())
        else:
            return _captioning(said, target, reference, scoring)
        return Verdict(float(correct), target if correct else response)

    def metrics(self, answers):
        formats = grouped(answers, "question_format")
        named = {form.replace("-", "_"): formats.get(form, []) for form in _INSTRUCTIONS}
        captions_left_out = any(answer.verdict.unparsed == OFFLINE for answer in named[_CAPTIONING])
        if captions_left_out:
            named.pop(_CAPTIONING)
        metrics: dict[str, Any] = {form: accuracies(group) for form, group in named.items() if group}
        if captions_left_out:
            means = [value[OVERALL] for value in metrics.values()]
            return metrics | {_CAPTIONING: None, "total": {OVERALL: mean(means)}}
        return metrics | {"total": accuracies(answers)}


def _without_kind(text: str) -> str:
    for kind in ("option", "sentence", "caption"):
        text = text.replace(kind, "")
    return text.strip()


def _captioning(caption: str, target: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
    if scoring.variant == OFFLINE:
        return Verdict(0.0, unparsed=OFFLINE)
    lines = str(reference.get("question", "")).split("\n")
    question = "\n".join(line for line in lines if "Generated Caption:" not in line)
    reply = scoring.ask("tempcompass_captioning", question=question, response=caption)
    found = re.search(r"Answer: (None|[A-D])", reply)
    choice = found.group(1).lower() if found else "none"
    correct = choice == target.split(".")[0].lower()
    return Verdict(float(correct), target if correct else choice)
