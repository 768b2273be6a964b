"""What each stage of the tiny model's training is made of: shares of its samples, by task.

Tasks of one thing come before those of two, and every stage goes on with all that was learned before it. Loss is a mean
over tokens, of which a box has ten times as many as a name: long answers have small shares.
"""

from collections.abc import Mapping

STAGES: Mapping[int, Mapping[str, float]] = {
    # Language alone.
    0: {"addition": 25, "copy": 15, "recall": 30, "boxes": 10, "times": 20},
    # The tower learns to see: names above all, for until it knows forms nothing else about a picture can be learned.
    1: {
        "digit": 38,
        "fashion": 30,
        "shape": 10,
        "colour": 3,
        "caption": 2,
        "talk": 2,
        "addition": 8,
        "copy": 1,
        "recall": 3,
        "boxes": 1,
        "times": 2,
    },
    # Where and how many: reading, boxes, counting; first questions about two things.
    2: {
        "ocr": 20,
        "box": 5,
        "count": 9,
        "position": 8,
        "talk": 3,
        "talk_of_two": 2,
        "colour_of": 3,
        "digit": 10,
        "fashion": 14,
        "shape": 2,
        "colour": 3,
        "caption": 5,
        "addition": 4,
        "copy": 1,
        "recall": 2,
        "boxes": 1,
        "times": 2,
        "video_name": 2,
        "motion": 2,
    },
    # Two things, two pictures, first videos.
    3: {
        "pair": 12,
        "same": 6,
        "talk_of_two": 2,
        "colour_of": 6,
        "box_of_two": 3,
        "caption_of_two": 5,
        "video_name": 4,
        "motion": 4,
        "order": 5,
        "when": 7,
        "ocr": 10,
        "box": 5,
        "count": 5,
        "position": 3,
        "talk": 1,
        "digit": 4,
        "fashion": 10,
        "shape": 1,
        "colour": 1,
        "caption": 3,
        "addition": 3,
        "copy": 1,
        "recall": 1,
        "boxes": 1,
        "times": 2,
    },
    # Video above all.
    4: {
        "motion": 3,
        "order": 8,
        "when": 5,
        "when_of_two": 7,
        "talk_of_times": 3,
        "static": 7,
        "stream": 7,
        "video_name": 3,
        "pair": 5,
        "same": 9,
        "talk_of_two": 1,
        "colour_of": 4,
        "box_of_two": 2,
        "caption_of_two": 4,
        "ocr": 9,
        "box": 2.5,
        "count": 4,
        "position": 2,
        "talk": 0.5,
        "digit": 4,
        "fashion": 13,
        "shape": 1,
        "colour": 1,
        "caption": 1,
        "addition": 5,
        "copy": 0.5,
        "recall": 0.5,
        "boxes": 0.5,
        "times": 1,
    },
}


def shares(stage: int) -> dict[str, float]:
    """Shares of a stage's tasks, which add up to 1."""
    weights = STAGES[stage]
    total = sum(weights.values())
    return {task: weight / total for task, weight in weights.items()}


def sources(stage: int, count: int, seed: int | str = 0, split: str = "train") -> dict[str, str]:
    """A source for each task of a stage, as `data_pipelines.synthetic.source` takes it; `count` samples in all."""
    return {
        task: f"synthetic://{split}/{task}?count={max(round(share * count), 1)}&seed={seed}"
        for task, share in shares(stage).items()
    }
