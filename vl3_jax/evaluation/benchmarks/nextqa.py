"""NExT-QA: why and in which order things happen in a video, as multiple choice."""

import string

from vl3_jax.errors import InputError
from vl3_jax.evaluation.benchmark import Item, PaperRow
from vl3_jax.evaluation.benchmarks.choice_video import ChoiceVideoBenchmark, choice_prompt

_KINDS = {"D": "Descriptive", "C": "Causal", "T": "Temporal"}


class NextQA(ChoiceVideoBenchmark):
    """Accuracy."""

    name, title, size = "nextqa", "NExT-QA (multiple choice)", 8564
    rows = (PaperRow("NextQA"),)
    text_error = "NameError"
    source = "github.com/doc-doc/NExT-QA, the multiple-choice files"
    layout = "test.csv, map_vid_vidorID.json\nNExTVideo/{path}.mp4"
    licence = "MIT for the questions; the videos come from VidOR and keep its terms"

    def items(self, data):
        paths, items = data.json("map_vid_vidorID.json"), []
        for row in data.csv("test.csv"):
            if row["video"] not in paths:
                raise InputError(f"{data.path('map_vid_vidorID.json')}: no video {row['video']}; download it again")
            options = [row[key] for key in (f"a{digit}" for digit in string.digits) if row.get(key)]
            reference = {"target": int(row["answer"]), "task_type": _KINDS[row["type"][0]], "options": options}
            media = [{"type": "video", "video": data.path("NExTVideo", f"{paths[row['video']]}.mp4")}]
            text = choice_prompt(row["question"], options)
            items.append(Item(str(len(items)), media, text, reference | {"question_type": row["type"]}))
        return items
