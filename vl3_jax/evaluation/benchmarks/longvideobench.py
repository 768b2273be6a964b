"""LongVideoBench: questions about long videos whose subtitles stand between the frames."""

from collections.abc import Mapping
from typing import Any

from vl3_jax.evaluation.benchmark import Benchmark, Item, PaperRow, Scoring, Verdict, accuracies, grouped, percent
from vl3_jax.evaluation.data_folder import DataFolder
from vl3_jax.evaluation.scorers.letters import letter_or_text, letters_of
from vl3_jax.evaluation.subtitles import interleave


class LongVideoBench(Benchmark):
    """Accuracy, over all and for each level."""

    name, title, kind, size = "longvideobench", "LongVideoBench (val)", "video", 1337
    rows = (PaperRow("LongVideoBench val", ("Overall", "Overall")),)
    splits = ("val",)
    source = "huggingface.co/datasets/longvideobench/LongVideoBench"
    layout = "lvb_val.json\nvideos/\nsubtitles/"
    licence = "CC BY-NC-SA 4.0; access on request"

    def items(self, data):
        items = []
        for number, row in enumerate(data.json("lvb_val.json")):
            options = [str(option) for option in row["candidates"]]
            letters = letters_of(len(options))
            lines = "".join(f"{letter}. {option}\n" for letter, option in zip(letters, options, strict=True))
            ask = "Answer with the option's letter from the given choices directly."
            reference = {"target": letters[row["correct_choice"]], "options": options}
            reference |= {"task_type": row["question_category"], "level": row["level"]}
            reference |= {key: row.get(key) for key in ("duration_group", "topic_category")}
            part = {"type": "video", "video": data.path("videos", row["video_path"])}
            text = f"Question: {row['question']}\n{lines}{ask}"
            items.append(Item(str(number), [part], text, reference, _with_subtitles(data, row, part, text)))
        return items

    def verdict(self, response: str, reference: Mapping[str, Any], scoring: Scoring) -> Verdict:
        letter = letter_or_text(response, reference["options"])
        return Verdict(float(letter == reference["target"]), letter)

    def metrics(self, answers):
        levels = {name: accuracies(group) for name, group in grouped(answers, "level").items()}
        return {"Overall": accuracies(answers)} | levels

    def details(self, answers):
        groups = grouped(answers, "duration_group")
        durations = {name: percent(group) for name, group in groups.items()}
        return super().details(answers) | ({"duration_group": durations} if groups else {})


def _with_subtitles(data: DataFolder, row: Mapping[str, Any], part: Mapping[str, Any], text: str):
    def compose(frame_times) -> list[dict[str, Any]]:
        cues = data.loose_json("subtitles", row["subtitle_path"]) if row.get("subtitle_path") else []
        offset = float(row.get("starting_timestamp_for_subtitles") or 0)
        inserts = interleave(cues, frame_times(part), offset, float(row["duration"]))
        return [{**part, "inserts": inserts} if inserts else dict(part), {"type": "text", "text": text}]

    return compose
