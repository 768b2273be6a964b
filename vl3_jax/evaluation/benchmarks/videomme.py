"""Video-MME: multiple choice about videos from seconds to an hour, without and with subtitles."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vl3_jax.evaluation.benchmark import (
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
from vl3_jax.evaluation.data_folder import DataFolder
from vl3_jax.evaluation.scorers.letters import letter_or_text
from vl3_jax.evaluation.scorers.unparsed import UnparsedError
from vl3_jax.evaluation.subtitles import lines_at, read_srt

_PROMPT = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter "
    "(A, B, C, or D) of the correct option.\n{question}\n{options}\nAnswer with the option's letter from the given "
    "choices directly and only give the best option. The best answer is:"
)
_SETS = {"without_subtitle": False, "with_subtitle": True}
_OFFICIAL_OPTION = re.compile(r"[A-D]\. (.*).")  # without its last character, taken to be a full stop


class VideoMME(Benchmark):
    """Accuracy, in two sets of results; each question is asked twice."""

    name, title, kind, size = "videomme", "Video-MME", "video", 5400
    rows = (
        PaperRow("VideoMME w/o sub", ("without_subtitle", "Overall")),
        PaperRow("VideoMME w/ sub", ("with_subtitle", "Overall")),
    )
    source = "huggingface.co/datasets/lmms-lab/Video-MME"
    layout = "test-00000-of-00001.parquet\nvideos/{videoID}.mp4, .avi, .mov or .mkv\nsubtitles/{videoID}.srt"
    licence = "academic research only; no sharing or changing without permission"

    def items(self, data):
        items = []
        for number, row in enumerate(data.table("test-00000-of-00001.parquet")):
            media = [{"type": "video", "video": data.video("videos", row["videoID"])}]
            text = _PROMPT.format(question=row["question"], options="\n".join(row["options"]))
            reference = {"target": row["answer"], "options": list(row["options"])}
            reference |= {key: row.get(key) for key in ("task_type", "duration", "domain", "sub_category")}
            items.append(Item(str(2 * number), media, text, reference | {"subtitle": False}))
            compose = _with_subtitles(data, row["videoID"], media[0], text)
            items.append(Item(str(2 * number + 1), media, text, reference | {"subtitle": True}, compose))
        return items

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        letter = letter_or_text(response, [_option_text(option, scoring.official) for option in reference["options"]])
        return Verdict(float(letter == reference["target"]), letter)

    def metrics(self, answers):
        return {name: accuracies(group) for name, group in _sets(answers).items()}

    def details(self, answers):
        details = super().details(answers)
        for name, chosen in _sets(answers).items():
            groups = {key: grouped(chosen, key) for key in ("duration", "domain")}
            details[name] |= {key: {value: percent(g) for value, g in groups[key].items()} for key in groups}
        return details


def _sets(answers: Sequence[ScoredAnswer]) -> dict[str, list[ScoredAnswer]]:
    sets = {
        name: [answer for answer in answers if bool(answer.reference.get("subtitle")) == subtitle]
        for name, subtitle in _SETS.items()
    }
    return {name: group for name, group in sets.items() if group}


def _option_text(option: str, official: bool) -> str:
    if official:
        found = _OFFICIAL_OPTION.search(option)
        if not found:
            raise UnparsedError("IndexError")
        return found.group(1)
    return re.sub(r"^\s*[A-D]\. ", "", option)


def _with_subtitles(data: DataFolder, video: str, part: Mapping[str, Any], text: str):
    def compose(frame_times) -> list[dict[str, Any]]:
        lines: Sequence[str] = ()
        if data.exists("subtitles", f"{video}.srt"):
            lines = lines_at(read_srt(data.text("subtitles", f"{video}.srt")), frame_times(part))
        listed = "This video's subtitles are listed below:\n" + "\n".join(lines)
        return [dict(part), {"type": "text", "text": f"{listed}\n{text}"}]

    return compose
