"""MMVU: expert knowledge about videos, answered directly and with a chain of thought."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vl3_jax.evaluation.benchmark import (
    OFFLINE,
    Benchmark,
    Item,
    PaperRow,
    ScoredAnswer,
    Scoring,
    Verdict,
    accuracies,
    grouped,
    percent,
)
from vl3_jax.evaluation.scorers.letters import last_letter, tail
from vl3_jax.evaluation.scorers.open_answers import words_match
from vl3_jax.evaluation.scorers.unparsed import UnparsedError

_CHOICE, _OPEN = "multiple-choice", "open-ended"
_DIRECT = "Do not generate any intermediate reasoning process. "
_STEPS = "step by step. Begin by explaining your reasoning process clearly. Conclude by stating the final answer using "
_FORMAT = "the following format: 'Therefore, the final answer is: "
_INSTRUCTIONS = {
    (_CHOICE, False): f"{_DIRECT}Answer directly with the option letter from the given choices.\n",
    (_OPEN, False): f"{_DIRECT}Directly output the final short answer.\n",
    (_CHOICE, True): (
        f"Answer the given multiple-choice question {_STEPS}{_FORMAT}$LETTER' (without quotes), where $LETTER is one "
        "of the options. Think step by\nstep before answering."
    ),
    (_OPEN, True): (
        f"Answer the given question {_STEPS}{_FORMAT}'Answer: $ANSWER' (without quotes), where $ANSWER is the final "
        "answer of the question. Think step by step\nbefore answering."
    ),
}
_SETS = {"without_cot": False, "with_cot": True}
_LETTERS = "ABCDE"
_FINAL = re.compile(rf"(?i:final answer is)\s*:?\s*\$?\s*\(?\s*([{_LETTERS}])")
_FIRST = re.compile(rf"\(?([{_LETTERS}])(?![A-Za-z0-9])")


class MMVU(Benchmark):
    """Accuracy by a judge, in two sets of results; the paper's is that with the chain of thought."""

    name, title, kind, size = "mmvu", "MMVU", "video", 2000
    rows = (PaperRow("MMVU val", ("with_cot", "Overall")),)
    splits = ("validation",)
    judge_prompts = ("mmvu_multiple_choice", "mmvu_open_ended")
    source = "huggingface.co/datasets/yale-nlp/MMVU"
    layout = "validation.json\nvideos/{folder}/{file}, the end of each `video` URL"
    licence = "CC BY-SA 4.0 for the questions; the videos keep their own terms"

    def items(self, data):
        items = []
        for number, row in enumerate(data.json("validation.json")):
            kind = row["question_type"]
            options = dict(row.get("choices") or {}) if kind == _CHOICE else {}
            lines = "".join(f"{letter}: {text}\n" for letter, text in options.items())
            folder, file = row["video"].split("/")[-2:]
            media = [{"type": "video", "video": data.path("videos", folder, file)}]
            reference = {"target": row["answer"], "task_type": row["metadata"]["subject"], "question_type": kind}
            reference |= {"options": options, "question": row["question"]}
            for use_cot in _SETS.values():
                text = f"\nQuestion: {row['question']}\n{lines}\n{_INSTRUCTIONS[kind, use_cot]}"
                items.append(Item(str(2 * number + use_cot), media, text, reference | {"use_cot": use_cot}))
        return items

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        response, target = response.strip(), str(reference["target"])
        if scoring.variant != OFFLINE:
            parsed = target if _judged(response, reference, scoring) else response
            return Verdict(float(parsed == target), parsed)
        if reference.get("question_type") == _CHOICE:
            letter = _letter(response)
            return Verdict(float(letter == target), letter, None if letter else "no letter")
        answer = re.sub(r"^\s*answer:\s*", "", tail(response), flags=re.IGNORECASE)
        return Verdict(float(words_match(answer, target)))

    def metrics(self, answers):
        return {name: accuracies(group) for name, group in _sets(answers).items()}

    def details(self, answers):
        details = super().details(answers)
        for name, chosen in _sets(answers).items():
            details[name] |= {kind: percent(group) for kind, group in grouped(chosen, "question_type").items()}
        return details


def _sets(answers: Sequence[ScoredAnswer]) -> dict[str, list[ScoredAnswer]]:
    sets = {
        name: [answer for answer in answers if bool(answer.reference.get("use_cot")) == cot]
        for name, cot in _SETS.items()
    }
    return {name: group for name, group in sets.items() if group}


def _letter(response: str) -> str | None:
    final = _FINAL.findall(response)
    if final:
        return final[-1]
    first = _FIRST.match(response)
    return first.group(1) if first else last_letter(response, len(_LETTERS))


def _judged(response: str, reference: Mapping[str, Any], scoring: Scoring) -> bool:
    if scoring.judge is None:
        return False
    fields = {"question": reference.get("question", ""), "target": reference["target"], "response": response}
    choice = reference.get("question_type") == _CHOICE
    if choice:
        fields["options"] = "\n".join(f"{letter}: {text}" for letter, text in (reference.get("options") or {}).items())
    reply = scoring.ask("mmvu_multiple_choice" if choice else "mmvu_open_ended", **fields)
    try:
        return json.loads(reply)["correct"] is True
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UnparsedError("the judge's reply is no verdict") from None
