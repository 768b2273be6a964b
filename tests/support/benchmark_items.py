"""Made-up items of every benchmark with the fields of its published files, responses to them, and the paper's value.

The files and where they are published: `Benchmark.layout` and `Benchmark.source`. `vl3_jax.evaluation.layouts` writes
them.
"""

import dataclasses
import pathlib
from typing import Any

from vl3_jax.evaluation import layouts


@dataclasses.dataclass(frozen=True)
class Case:
    """Items of a benchmark, a response to each in the order of loading, and the headline of these responses."""

    task: str
    rows: list[dict[str, Any]]
    responses: list[Any]
    headline: dict[str, float]

    @property
    def benchmark(self) -> str:
        return self.task.partition("@")[0]

    def write(self, root: pathlib.Path) -> None:
        """Writes the data below the folder of all benchmarks."""
        layouts.write(self.benchmark, self.rows, root / self.benchmark)


def _choices(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {"video": f"{n}.mp4", "question": f"What {n}?", "candidates": list(p), "answer": p[1]}
        for n, p in enumerate(pairs)
    ]


def _mmmu(number: int, kind: str, options: str, answer: str) -> dict[str, Any]:
    question = f"<image 1> What is number {number}?"
    row = {
        "id": f"validation_Art_{number}",
        "question": question,
        "options": options,
        "explanation": "",
        "answer": answer,
    }
    return row | {"question_type": kind, "subject": "Art"}


_ONE_IMAGE = {"image": "images/a.png", "question": "How many?"}
_COUNTED = [{**_ONE_IMAGE, "question_id": n, "answer": ["12"]} for n in (1, 2)]
_VIDEOMME = {"task_type": "Counting Problem", "duration": "short", "domain": "Knowledge", "sub_category": "Geography"}
_MMVU = {"choices": {"A": "heat", "B": "light"}, "question_type": "multiple-choice", "metadata": {"subject": "Physics"}}
_LVB = {"question_category": "S2O", "topic_category": "KH", "duration_group": 60, "duration": 3.0}
_CASES = [
    Case(
        "ChartQA",
        [
            {**_ONE_IMAGE, "question_id": n, "answer": a, "task": t}
            for n, a, t in ((1, "40", "augmented"), (2, "Red", "human"))
        ],
        ["41", "blue"],
        {"ChartQA": 50.0},
    ),
    Case("DocVQA", _COUNTED, ["12", "nothing"], {"DocVQA test": 50.0}),
    Case(
        "InfoVQA",
        [{"questionId": n, "image_local_name": "1.jpeg", "question": "How many?", "answers": ["12"]} for n in (1, 2)],
        ["12", "nothing"],
        {"InfoVQA test": 50.0},
    ),
    Case(
        "OCRBench",
        [
            {
                "dataset_name": name,
                "id": n,
                "question": "What?",
                "answers": ["x + 1"],
                "type": kind,
                "image_path": f"{n}.png",
            }
            for n, (name, kind) in enumerate(
                [("HME100k", "Handwriting Recognition"), ("IIIT5K", "Regular Text Recognition")]
            )
        ],
        ["x+1", "x+1"],
        {"OCRBench": 1.0},
    ),
    Case(
        "MathVista",
        [
            {
                "pid": "1",
                "image": "images/1.jpg",
                "choices": ["1/2", "1/3"],
                "answer": "1/3",
                "question_type": "multi_choice",
            }
            | {"answer_type": "text", "precision": None, "metadata": {"task": "geometry"}, "query": "Question: which?"},
            {"pid": "2", "image": "images/1.jpg", "choices": None, "answer": "1.2", "question_type": "free_form"}
            | {
                "answer_type": "float",
                "precision": 1,
                "metadata": {"task": "statistics"},
                "query": "Question: how much?",
            },
        ],
        ["The answer is (B)", "about 1.3"],
        {"MathVista testmini": 50.0},
    ),
    Case(
        "MathVision",
        [
            {
                "id": "1",
                "question": "<image1>?",
                "options": ["3", "4"],
                "image": "1.jpg",
                "answer": "B",
                "subject": "counting",
            },
            {
                "id": "2",
                "question": "<image1>?",
                "options": [],
                "image": "1.jpg",
                "answer": "0.5",
                "subject": "algebra",
            },
        ],
        ["\\boxed{4}", "\\boxed{2}"],
        {"MathVision test": 50.0},
    ),
    Case(
        "MMMU",
        [_mmmu(1, "multiple-choice", "['x', '<image 2>']", "B"), _mmmu(2, "open", "[]", "1872")],
        ["(B)", "1900"],
        {"MMMU val": 50.0},
    ),
    Case(
        "MMMU_Pro",
        [_mmmu(n, "multiple-choice", "['x', 'y', 'z']", "C") for n in (1, 2)],
        ["C", "D"],
        {"MMMU-Pro": 50.0},
    ),
    Case(
        "BLINK",
        [
            {"idx": f"val_{task}_1", "prompt": "Which?\n(A) 0\n(B) 3", "choices": ["0", "3"], "answer": "(B)"}
            for task in ("Counting", "IQ_Test")
        ],
        ["The answer is (B).", "A"],
        {"BLINK test": 50.0},
    ),
    Case(
        "RealWorldQA",
        [{"question": f"Which way {n}?", "answer": "A"} for n in (1, 2)],
        ["a.", ""],
        {"RealWorldQA": 50.0},
    ),
    Case("AI2D", [{**_ONE_IMAGE, "question_id": n, "answer": "B"} for n in (1, 2)], ["( B )", "A"], {"AI2D": 50.0}),
    Case(
        "GQA",
        [
            {"question_id": str(n), "image": "n1.jpg", "text": "Is it?", "category": "default", "answer": "no"}
            for n in (1, 2)
        ],
        ["No.", "not"],
        {"GQA": 50.0},
    ),
    Case(
        "MME",
        [
            {"image": f"{part}/1.png", "line": f"Is it {word}? Please answer yes or no.\t{answer}"}
            for part in ("existence", "code_reasoning")
            for word, answer in (("a", "Yes"), ("b", "No"))
        ],
        ["Yes", "No", "Yes", "yes"],
        {"MME": 250.0},
    ),
    Case(
        "videomme",
        [
            {
                "videoID": "v",
                "question_id": "1-1",
                "question": "How many?",
                "options": ["A. One.", "B. Two."],
                "answer": "B",
            }
        ],
        ["B", "one"],
        {"VideoMME w/o sub": 100.0, "VideoMME w/ sub": 0.0},
    ),
    Case(
        "mmvu",
        [{"id": "v0", "video": "https://host/CS/1.mp4", "question": "Which?", "answer": "B", **_MMVU}],
        ["A", "Therefore, the final answer is: B"],
        {"MMVU val": 100.0},
    ),
    Case(
        "mvbench",
        [
            {**row, "start": 0.5, "end": 1.5, "task": task}
            | ({"video": "frames"} if task == "Episodic Reasoning" else {})
            for row, task in zip(
                _choices(("sits", "runs"), ("eats", "runs")), ("Action Sequence", "Episodic Reasoning"), strict=True
            )
        ],
        ["(B), as seen", "eats"],
        {"MVBench": 50.0},
    ),
    Case(
        "egoschema",
        [
            {"q_uid": name, "question": "What?", **{f"option {n}": f"does {n}" for n in range(5)}} | known
            for name, known in (("abc", {"answer": 3}), ("def", {}))
        ],
        ["C", "A"],
        {},
    ),
    Case(
        "perception_test@valid",
        [
            {"id": n, "question": "Moving?", "options": ["Yes", "No", "Maybe"], "answer_id": 1, "video": "video_1"}
            for n in (0, 1)
        ],
        ["no", "((A))"],
        {"PerceptionTest test": 50.0},
    ),
    Case(
        "perception_test",
        [{"id": 0, "question": "Moving?", "options": ["Yes", "No", "Maybe"], "video": "video_1"}],
        ["no"],
        {},
    ),
    Case(
        "activitynet_qa",
        [
            {"video_name": "x", "question": "what is it", "question_id": f"v_x_{n}", "answer": "dog", "type": 5}
            for n in (1, 2)
        ],
        ["a brown dog", "cat"],
        {"ActivityNet-QA": 50.0},
    ),
    Case(
        "mlvu",
        [
            {**row, "task": task}
            for row, task in zip(_choices(("a", "b"), ("c", "d")), ("1_plotQA", "2_needle"), strict=True)
        ],
        ["(B)", "c"],
        {"MLVU dev": 50.0},
    ),
    Case(
        "longvideobench",
        [
            {
                "id": str(n),
                "video_path": "L.mp4",
                "subtitle_path": "L.json",
                "question": "What?",
                "candidates": ["cup", "hat"],
            }
            | {"correct_choice": 1, "level": level, "starting_timestamp_for_subtitles": 0, **_LVB}
            | {"subtitles": [{"timestamp": [0.2, 1.8], "text": "good morning"}]}
            for n, level in enumerate(("L1-Perception", "L2-Relation"))
        ],
        ["the hat", "A"],
        {"LongVideoBench val": 50.0},
    ),
    Case(
        "lvbench",
        [
            {
                "uid": str(n),
                "question": "Who?\n(A) Ann\n(B) Bob",
                "answer": "B",
                "question_type": ["reasoning", "entity"],
            }
            for n in (1, 2)
        ],
        ["(b)", "It is a dog, so B"],
        {"LVBench": 50.0},
    ),
    Case(
        "tempcompass",
        [
            {"format": "yes_no", "question": "Running?", "answer": "yes", "dim": "action"},
            {"format": "captioning", "question": "Which?\nA. x\nGenerated Caption:", "answer": "A. x", "dim": "action"},
            {"format": "caption_matching", "question": "Which?", "answer": "Caption B: it falls", "dim": "order"},
            {"format": "multi-choice", "question": "What?", "answer": "B. it falls", "dim": "order"},
        ],
        ["Yes.", "x", "b", "a"],
        {"TempCompass": 200 / 3},
    ),
    Case(
        "nextqa",
        [
            {
                "video": 4010069381,
                "question": f"how {n}",
                "answer": 1,
                "type": kind,
                "a0": "rolls",
                "a1": "taps",
                "a2": "",
            }
            for n, kind in enumerate(("CH", "TN"))
        ],
        ["he taps", "A"],
        {"NextQA": 50.0},
    ),
    Case(
        "charades_sta",
        [
            {"question_id": f"q{n}", "video": "AO8RW.mp4", "timestamps": [[2.0, 8.0]]}
            | {"conversation": [{"role": "user", "content": "When does it happen? "}]}
            for n in (1, 2)
        ],
        ["From 2.0 to 8.0 seconds, from 2 to 8", "never"],
        {"Charades-STA": 50.0},
    ),
]
for _row in next(case for case in _CASES if case.task == "videomme").rows:
    _row |= _VIDEOMME | {"srt": "1\n00:00:00,000 --> 00:00:02,000\nhello\nthere\n"}
CASES = {case.task: case for case in _CASES}
