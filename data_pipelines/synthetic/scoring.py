"""Scores answers against the references of the samples, by the metric of each task.

| metric | score of an answer | score of a test set |
| --- | --- | --- |
| exact | 1 if equal after normalisation | mean |
| box | 1 if IoU >= 0.5 | mean; also the mean IoU |
| span | temporal IoU | mean |
| caption | F1 of the attributes: names, colours of names, positions | mean |
| speak | | F1 of speaking in the right frames, over the frames of all streams; also the F1 of waiting |
"""

import collections
import itertools
from collections.abc import Sequence
from typing import Any

from data_pipelines.synthetic import parsing
from data_pipelines.synthetic.registry import BOX, CAPTION, SPAN, SPEAK, TASKS, check_tasks

IOU = 0.5
_CANDIDATES = 100  # number of most frequent answers that are tried as the constant answer

Words = Sequence[str | None]  # what is said after each frame of a stream, None for nothing


def score(task: str, answer: str, reference: dict[str, Any]) -> float:
    """Returns the score of one answer, 0 to 1, for any task but streams."""
    metric = TASKS[check_tasks([task])[0]].metric
    if metric == BOX:
        return float(best_iou(answer, reference) >= IOU)
    if metric == SPAN:
        return span_iou(parsing.parse_spans(answer), reference["span"])
    if metric == CAPTION:
        return set_f1(parsing.parse_attributes(answer), parsing.parse_attributes(reference["answer"]))
    return float(parsing.normalise(answer) == parsing.normalise(reference["answer"]))


def evaluate(task: str, answers: Sequence[Any], references: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Scores a test set.

    Args:
      task: Name of the task.
      answers: Decoded texts; for a stream, the list of what was said after each frame (None for nothing).
      references: References of the samples, in the order of the answers.

    Returns:
      "score"; "majority", the score of the best constant answer; "count"; and further values of the metric.
    """
    if len(answers) != len(references) or not references:
        raise ValueError(f"{len(answers)} answers to {len(references)} questions")
    result = {"count": len(references), "majority": majority(task, references)}
    metric = TASKS[check_tasks([task])[0]].metric
    if metric == SPEAK:
        return {**stream_scores(answers, [reference["words"] for reference in references]), **result}
    pairs = list(zip(answers, references, strict=True))
    result["score"] = _mean([score(task, answer, reference) for answer, reference in pairs])
    if metric == BOX:
        result["mean_iou"] = _mean([best_iou(answer, reference) for answer, reference in pairs])
    return result


def majority(task: str, references: Sequence[dict[str, Any]]) -> float:
    """Returns the score of the best constant answer; for streams, of speaking after every frame."""
    if TASKS[check_tasks([task])[0]].metric == SPEAK:
        words = [reference["words"] for reference in references]
        return stream_scores([[""] * len(stream) for stream in words], words)["score"]
    common = collections.Counter(reference["answer"] for reference in references).most_common(_CANDIDATES)
    return max(_mean([score(task, answer, reference) for reference in references]) for answer, _ in common)


def stream_scores(answers: Sequence[Words], references: Sequence[Words]) -> dict[str, float]:
    """Scores streams.

    Args:
      answers: For each stream, what the model said after each frame. Missing frames count as silence.
      references: For each stream, what should be said after each frame.

    Returns:
      "score" and "wait_f1", the F1 of speaking and of waiting over all frames, and "words", the share of right words
      among the frames in which the model rightly spoke.
    """
    counts = collections.Counter()
    right = 0
    for answer, reference in zip(answers, references, strict=True):
        for said, expected in itertools.zip_longest(answer[: len(reference)], reference):
            counts[said is not None, expected is not None] += 1
            if said is not None and expected is not None:
                right += parsing.normalise(said) == parsing.normalise(expected)
    mistakes = counts[True, False] + counts[False, True]
    speak, wait = (_f1(counts[kind, kind], mistakes) for kind in (True, False))
    words = right / counts[True, True] if counts[True, True] else 0.0
    return {"score": speak, "wait_f1": wait, "words": words}


def best_iou(answer: str, reference: dict[str, Any]) -> float:
    """Returns the IoU of the first box in an answer with the reference box, 0 if the answer has no box."""
    expected = reference["box"] if "box" in reference else parsing.parse_boxes(reference["answer"])[0]
    boxes = parsing.parse_boxes(answer)
    return box_iou(boxes[0], expected) if boxes else 0.0


def box_iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns the IoU of two boxes x0, y0, x1, y1."""
    across = min(first[2], second[2]) - max(first[0], second[0])
    down = min(first[3], second[3]) - max(first[1], second[1])
    overlap = max(across, 0) * max(down, 0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)) - overlap
    return overlap / union if union > 0 else 0.0


def span_iou(spans: Sequence[tuple[float, float]], reference: Sequence[float]) -> float:
    """Returns the temporal IoU: the sum of the spans' overlaps with the reference over the length of their union."""
    overlap = sum(max(min(end, reference[1]) - max(start, reference[0]), 0) for start, end in spans)
    total = sum(end - start for start, end in spans) + reference[1] - reference[0]
    return min(overlap / (total - overlap), 1.0) if total > overlap else 0.0


def set_f1(predicted: frozenset[str], expected: frozenset[str]) -> float:
    """Returns the harmonic mean of precision and recall of a predicted set."""
    return _f1(len(predicted & expected), len(predicted ^ expected))


def _f1(hits: int, mistakes: int) -> float:
    return 2 * hits / (2 * hits + mistakes) if hits else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
