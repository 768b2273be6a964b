"""MLVU: multiple choice about long videos."""

from vl3_jax.evaluation.benchmark import Item, PaperRow
from vl3_jax.evaluation.benchmarks.choice_video import ChoiceVideoBenchmark, choice_prompt, index_of_answer

# Label in the report: folder of the videos, which is also the name of the question file.
TASKS = {
    "TR:  (Topic Reasoning)": "7_topic_reasoning",
    "AR:  (Anomaly Recognition)": "6_anomaly_reco",
    "NQA: (Needle QA)": "2_needle",
    "ER:  (Ego Reasoning)": "3_ego",
    "PQA: (Plot QA)": "1_plotQA",
    "AC:  (Action Count)": "4_count",
    "AO:  (Action Order)": "5_order",
}


class MLVU(ChoiceVideoBenchmark):
    """Accuracy over all questions; the mean over the tasks, the benchmark's own M-Avg, is reported beside it."""

    name, title, size = "mlvu", "MLVU (dev)", 2174
    rows = (PaperRow("MLVU dev"),)
    splits = ("dev",)
    text_error = "NameError"
    source = "huggingface.co/datasets/MLVU/MVLU"
    layout = "json/{n}_{task}.json and video/{n}_{task}/ for the 7 multiple-choice tasks"
    licence = "CC BY-NC-SA 4.0"

    def items(self, data):
        items = []
        for label, folder in TASKS.items():
            for row in data.json("json", f"{folder}.json"):
                options = row["candidates"]
                target = index_of_answer(row["answer"], options, data.path("json", f"{folder}.json"))
                media = [{"type": "video", "video": data.path("video", folder, row["video"])}]
                reference = {"target": target, "task_type": label, "options": options}
                items.append(Item(str(len(items)), media, choice_prompt(row["question"], options), reference))
        return items
