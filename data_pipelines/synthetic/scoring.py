"""Judges answers against the truth of the samples, by the metric of each task.

| metric | score of an answer | of a test set |
| --- | --- | --- |
| exact | 1 if equal after normalisation | mean |
| box | 1 if IoU >= 0.5 | mean; mean IoU beside it |
| span | temporal IoU | mean |
| caption | F1 of what is said: names, colours of names, the place | mean |
| speak | | F1 of speaking in the right frames, over all streams together; F1 of waiting beside it |
"""

import collections
from collections.abc import Sequence
from typing import Any

from data_pipelines.synthetic import parsing
from data_pipelines.synthetic.registry import BOX, CAPTION, SPAN, SPEAK, TASKS, check_tasks

IOU = 0.5
_CANDIDATES = 100  # most frequent answers that are tried as the one answer to everything

Words = Sequence[str | None]  # of a stream: what is said after each frame, None for nothing


def score(task: str, answer: str, truth: dict[str, Any]) -> float:
    """0..1, of one answer to a task that is not a stream."""
    metric = TASKS[check_tasks([task])[0]].metric
    if metric == BOX:
        return float(best_iou(answer, truth) >= IOU)
    if metric == SPAN:
        return span_iou(parsing.parse_spans(answer), truth["span"])
    if metric == CAPTION:
        return f1_of(parsing.parse_attributes(answer), parsing.parse_attributes(truth["answer"]))
    return float(parsing.normalise(answer) == parsing.normalise(truth["answer"]))


def evaluate(task: str, answers: Sequence[Any], truths: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Scores a test set.

    Args:
      task: its name.
      answers: decoded texts; of streams, for each what was said after each frame (None for nothing).
      truths: of the samples.

    Returns:
      "score"; "majority", what the best constant answer would score; "count"; and what the metric has beside it.
    """
    if len(answers) != len(truths) or not truths:
        raise ValueError(f"{len(answers)} answers to {len(truths)} questions")
    result = {"count": len(truths), "majority": majority(task, truths)}
    metric = TASKS[check_tasks([task])[0]].metric
    if metric == SPEAK:
        return {**stream_scores(answers, [truth["words"] for truth in truths]), **result}
    result["score"] = _mean([score(task, answer, truth) for answer, truth in zip(answers, truths, strict=True)])
    if metric == BOX:
        result["mean_iou"] = _mean([best_iou(answer, truth) for answer, truth in zip(answers, truths, strict=True)])
    return result


def majority(task: str, truths: Sequence[dict[str, Any]]) -> float:
    """What the best of the constant answers scores; of streams, always speaking."""
    if TASKS[check_tasks([task])[0]].metric == SPEAK:
        words = [truth["words"] for truth in truths]
        return stream_scores([[""] * len(one) for one in words], words)["score"]
    common = collections.Counter(truth["answer"] for truth in truths).most_common(_CANDIDATES)
    return max(_mean([score(task, answer, truth) for truth in truths]) for answer, _ in common)


def stream_scores(answers: Sequence[Words], truths: Sequence[Words]) -> dict[str, float]:
    """F1 of speaking and of waiting over all frames; "words": how often what was rightly said was the right thing."""
    counts = collections.Counter()
    right = 0
    for answer, truth in zip(answers, truths, strict=True):
        given = [*answer[: len(truth)], *[None] * (len(truth) - len(answer))]
        for said, true in zip(given, truth, strict=True):
            counts[said is not None, true is not None] += 1
            if said is not None and true is not None:
                right += parsing.normalise(said) == parsing.normalise(true)
    mistakes = counts[True, False] + counts[False, True]
    speak, wait = (_f1(counts[kind, kind], mistakes) for kind in (True, False))
    words = right / counts[True, True] if counts[True, True] else 0.0
    return {"score": speak, "wait_f1": wait, "words": words}


def best_iou(answer: str, truth: dict[str, Any]) -> float:
    """Of the first box in an answer with the true one; 0 without a box."""
    true = truth["box"] if "box" in truth else parsing.parse_boxes(truth["answer"])[0]
    boxes = parsing.parse_boxes(answer)
    return box_iou(boxes[0], true) if boxes else 0.0


def box_iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Of two boxes x0, y0, x1, y1."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    overlap = max(across, 0) * max(down, 0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - overlap
    return overlap / union if union > 0 else 0.0


def span_iou(spans: Sequence[tuple[float, float]], truth: Sequence[float]) -> float:
    """Sum of overlaps over the sum of all lengths without them, as temporal grounding is judged."""
    overlap = sum(max(min(end, truth[1]) - max(start, truth[0]), 0) for start, end in spans)
    total = sum(end - start for start, end in spans) + truth[1] - truth[0]
    return min(overlap / (total - overlap), 1.0) if total > overlap else 0.0


def f1_of(found: frozenset[str], true: frozenset[str]) -> float:
    """Harmonic mean of precision and recall of two sets."""
    return _f1(len(found & true), len(found ^ true))


def _f1(hits: int, mistakes: int) -> float:
    return 2 * hits / (2 * hits + mistakes) if hits else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
