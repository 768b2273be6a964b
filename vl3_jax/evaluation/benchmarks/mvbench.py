"""MVBench: twenty tasks about short videos."""

from vl3_jax.evaluation.benchmark import Item, PaperRow
from vl3_jax.evaluation.benchmarks.choice_video import ChoiceVideoBenchmark, choice_prompt, index_of_answer

_STAR, _CLEVRER, _PERCEPTION = "star/Charades_v1_480", "clevrer/video_validation", "perception/videos"
# Task: folder of its videos, and whether a question is about a part of one.
TASKS = {
    "Action Sequence": (_STAR, True),
    "Action Prediction": (_STAR, True),
    "Action Antonym": ("ssv2_video", False),
    "Fine-grained Action": ("Moments_in_Time_Raw/videos", False),
    "Unexpected Action": ("FunQA_test/test", False),
    "Object Existence": (_CLEVRER, False),
    "Object Interaction": (_STAR, True),
    "Object Shuffle": (_PERCEPTION, False),
    "Moving Direction": (_CLEVRER, False),
    "Action Localization": ("sta/sta_video", True),
    "Scene Transition": ("scene_qa/video", False),
    "Action Count": (_PERCEPTION, False),
    "Moving Count": (_CLEVRER, False),
    "Moving Attribute": (_CLEVRER, False),
    "State Change": (_PERCEPTION, False),
    "Fine-grained Pose": ("nturgbd", False),
    "Character Order": (_PERCEPTION, False),
    "Egocentric Navigation": ("vlnqa", False),
    "Episodic Reasoning": ("tvqa/frames_fps3_hq", True),  # folders of frames, 3 a second
    "Counterfactual Inference": (_CLEVRER, False),
}


class MVBench(ChoiceVideoBenchmark):
    """Accuracy."""

    name, title, size = "mvbench", "MVBench", 4000
    rows = (PaperRow("MVBench"),)
    source = "huggingface.co/datasets/OpenGVLab/MVBench"
    layout = "json/{task}.json for each of the 20 tasks\nvideo/{folder}/ as in the data set"
    licence = "MIT for the questions; the videos keep their own terms, NTU RGB+D and Moments in Time on request"

    def items(self, data):
        items = []
        for task, (folder, trimmed) in TASKS.items():
            file = f"{task.lower().replace(' ', '_').replace('-', '_')}.json"
            for row in data.json("json", file):
                part = {"type": "video", "video": data.path("video", folder, row["video"])}
                if trimmed:
                    part |= {"start": row["start"], "end": row["end"], "precise_time": True}
                options = row["candidates"]
                target = index_of_answer(row["answer"], options, data.path("json", file))
                reference = {"target": target, "task_type": task, "options": options}
                items.append(Item(str(len(items)), [part], choice_prompt(row["question"], options), reference))
        return items
