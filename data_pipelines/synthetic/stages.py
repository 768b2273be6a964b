"""The training stages of nano: the share of samples of each task.

Tasks about one object come before those about two, and every stage keeps the tasks of the stages before it. The loss is
a mean over tokens, and a box has ten times as many tokens as a name: tasks with long answers have small shares.
"""

from collections.abc import Mapping

# Tasks of one kind are in one row. The order of a stage's tasks determines which sample belongs to which task.
STAGES: Mapping[int, Mapping[str, float]] = {
    # Language only.
    0: {"addition": 25, "copy": 15, "recall": 30, "boxes": 10, "times": 20},
    # Names above all: until the vision tower tells shapes apart, nothing else about an image can be learned.
    1: {"digit": 38, "fashion": 30, "shape": 10, "colour": 3, "caption": 2, "talk": 2}
    | {"addition": 8, "copy": 1, "recall": 3, "boxes": 1, "times": 2},
    # Reading, boxes, positions, counting; first questions about two objects.
    2: {"ocr": 20, "box": 5, "count": 9, "position": 8, "talk": 3, "talk_of_two": 2, "colour_of": 3}
    | {"digit": 10, "fashion": 14, "shape": 2, "colour": 3, "caption": 5}
    | {"addition": 4, "copy": 1, "recall": 2, "boxes": 1, "times": 2}
    | {"video_name": 2, "motion": 2},
    # Two objects, two images, first videos.
    3: {"pair": 12, "same": 6, "talk_of_two": 2, "colour_of": 6, "box_of_two": 3, "caption_of_two": 5}
    | {"video_name": 4, "motion": 4, "order": 5, "when": 7}
    | {"ocr": 10, "box": 5, "count": 5, "position": 3, "talk": 1}
    | {"digit": 4, "fashion": 10, "shape": 1, "colour": 1, "caption": 3}
    | {"addition": 3, "copy": 1, "recall": 1, "boxes": 1, "times": 2},
    # Mostly videos.
    4: {"motion": 3, "order": 8, "when": 5, "when_of_two": 7, "talk_of_times": 3, "static": 7, "stream": 7}
    | {"video_name": 3, "pair": 5, "same": 9}
    | {"talk_of_two": 1, "colour_of": 4, "box_of_two": 2, "caption_of_two": 4}
    | {"ocr": 9, "box": 2.5, "count": 4, "position": 2, "talk": 0.5}
    | {"digit": 4, "fashion": 13, "shape": 1, "colour": 1, "caption": 1}
    | {"addition": 5, "copy": 0.5, "recall": 0.5, "boxes": 0.5, "times": 1},
}


def shares(stage: int) -> dict[str, float]:
    """Returns the share of each task of a stage; the shares add up to 1."""
    weights = STAGES[stage]
    total = sum(weights.values())
    return {task: weight / total for task, weight in weights.items()}


def sources(stage: int, count: int, seed: int | str = 0) -> dict[str, str]:
    """Returns a `synthetic://` URL of training data for each task of a stage.

    Args:
      stage: Number of the stage, 0 to 4.
      count: Number of samples of all tasks together.
      seed: Random seed of the data, or a placeholder for it that a configuration fills in.
    """
    return {
        task: f"synthetic://train/{task}?count={max(round(share * count), 1)}&seed={seed}"
        for task, share in shares(stage).items()
    }
