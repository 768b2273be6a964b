"""EgoSchema: three-minute videos as their wearers see them."""

from vl3_jax.evaluation.benchmark import Item, PaperRow, Scoring, percent
from vl3_jax.evaluation.benchmarks.choice_video import ChoiceVideoBenchmark, lettered
from vl3_jax.evaluation.data_folder import VIDEO_ENDINGS

_SUBSET = "subset_answers.json"
_PROMPT = (
    "Select the best answer to the following multiple-choice question based on the video.\n{question}\nOptions:\n"
    "{options}Answer with the option's letter from the given choices directly and only give the best option. The "
    "best answer is: "
)


class EgoSchema(ChoiceVideoBenchmark):
    """Accuracy by the benchmark's server; that on the public subset is computed here."""

    name, title, size = "egoschema", "EgoSchema", 5031
    rows = (PaperRow("EgoSchema test", ("Total",)),)
    comma_wraps = False
    source = "github.com/egoschema/EgoSchema; subset_answers.json from there has the 500 public answers"
    layout = "questions.json\ngood_clips_git/{q_uid}.mp4\nsubset_answers.json for the score on the public subset"
    licence = "the Ego4D licence agreement must be signed"
    submission = True

    def items(self, data):
        known = data.json(_SUBSET) if data.exists(_SUBSET) else {}
        items = []
        for row in data.json("questions.json"):
            options = [row[f"option {number}"] for number in range(5)]
            video = data.video("good_clips_git", row["q_uid"], endings=VIDEO_ENDINGS[:4])
            text = _PROMPT.format(question=row["question"], options=lettered(options))
            reference = {"target": known.get(row["q_uid"]), "task_type": None, "options": options}
            items.append(Item(row["q_uid"], [{"type": "video", "video": video}], text, reference))
        return items

    def metrics(self, answers):
        return {"Subset": percent(answers)}

    def details(self, answers):
        return {}

    def submit(self, answers, items):
        verdicts = {
            item.id: self.score(answers[item.id], {**item.reference, "target": -1}, Scoring()).parsed
            for item in items
            if item.id in answers
        }
        return {identifier: -1 if index is None else index for identifier, index in verdicts.items()}
