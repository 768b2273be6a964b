"""Overlap of masks: intersection over union, one at a time, of pairs, and of detections as average precision.

Masks are bool arrays [h, w]; sets of them are [n, h, w].
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

_RECALLS = np.linspace(0, 1, 101)  # at which COCO reads the precision


class Overlap(NamedTuple):
    """What two masks have in common, and together, in pixels."""

    intersection: int
    union: int

    @classmethod
    def of(cls, predicted: np.ndarray, target: np.ndarray) -> "Overlap":
        """Counts the pixels of two masks of one size."""
        if predicted.shape != target.shape:
            raise ValueError(f"masks of {predicted.shape} and {target.shape}; expected one size")
        return cls(int(np.count_nonzero(predicted & target)), int(np.count_nonzero(predicted | target)))

    @property
    def iou(self) -> float:
        """Intersection over union: J, the region similarity. Two empty masks are equal."""
        return self.intersection / self.union if self.union else 1.0


def cumulative_iou(overlaps: Iterable[Overlap]) -> float:
    """Returns cIoU, all intersections over all unions, in which large objects count most; 1 if all are empty."""
    totals = [sum(column) for column in zip(*overlaps, strict=True)]
    return Overlap(*totals).iou if totals else 0.0


def generalised_iou(overlaps: Iterable[Overlap]) -> float:
    """Returns gIoU, the mean of each IoU; an empty answer to an empty target counts 1."""
    values = [overlap.iou for overlap in overlaps]
    return float(np.mean(values)) if values else 0.0


def pixel_accuracy(predicted: np.ndarray, target: np.ndarray) -> float:
    """Returns A, the share of pixels that are right, inside and outside."""
    return float(np.mean(predicted == target))


def robustness(predicted: np.ndarray, target: np.ndarray, foreground: np.ndarray) -> float:
    """Returns R, 1 less what is drawn outside the target as a multiple of all objects; at least 0.

    Args:
      predicted: Mask, [h, w] bool.
      target: Mask of what is asked for, [h, w] bool.
      foreground: Mask of all objects, [h, w] bool.
    """
    wrong = np.count_nonzero(predicted & ~target)
    return max(0.0, 1 - wrong / (np.count_nonzero(foreground) + 1e-6))


def pairwise_iou(predicted: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns the IoU of each prediction with each target, [predictions, targets] float64; 0 for two empty masks."""
    pairs = [[Overlap.of(mask, target) for target in targets] for mask in predicted]
    values = [[pair.iou if pair.union else 0.0 for pair in row] for row in pairs]
    return np.reshape(np.asarray(values, np.float64), (len(predicted), len(targets)))


def greedy_pairs(ious: np.ndarray, allowed: np.ndarray | None = None) -> list[tuple[int, int]]:
    """Pairs predictions and targets one to one, those of the largest IoU first.

    Args:
      ious: [predictions, targets].
      allowed: Pairs that may be formed, bool of the same shape; None is all whose IoU is not 0.

    Returns:
      Indices of each pair.
    """
    remaining = np.where(ious > 0 if allowed is None else allowed & (ious > 0), ious, 0.0)
    pairs = []
    while remaining.size and remaining.max() > 0:
        row, column = np.unravel_index(remaining.argmax(), remaining.shape)
        pairs.append((int(row), int(column)))
        remaining[row], remaining[:, column] = 0, 0
    return pairs


def paired_iou(ious: np.ndarray) -> float:
    """Returns the mean IoU of the pairs of an image, 0 without any; its mean over images is GCG's mIoU."""
    pairs = greedy_pairs(ious)
    return float(np.mean([ious[pair] for pair in pairs])) if pairs else 0.0


class Detections(NamedTuple):
    """What is predicted in one image, for the average precision.

    Attributes:
      ious: IoU with each target, [predictions, targets].
      scores: Confidence of each prediction, [predictions].
    """

    ious: np.ndarray
    scores: np.ndarray


def average_precision(images: Sequence[Detections], threshold: float = 0.5) -> float:
    """Returns the average precision of masks without classes, by COCO's rule.

    In each image a prediction takes the free target with the largest IoU, if that reaches the threshold; those of the
    highest score choose first. The precision, made monotonous, is read at 101 recalls.

    Args:
      images: Predictions of each image.
      threshold: Least IoU of a hit; 0.5 gives AP50.

    Returns:
      From 0 to 1; 0 without targets.
    """
    hits, scores = [], []
    for image in images:
        free = image.ious.copy()
        for row in np.argsort(-image.scores, kind="stable"):
            best = int(free[row].argmax()) if free.shape[1] else -1
            hit = best >= 0 and free[row, best] >= threshold
            if hit:
                free[:, best] = -1
            hits.append(hit)
            scores.append(image.scores[row])
    targets = sum(image.ious.shape[1] for image in images)
    if not targets or not hits:
        return 0.0
    found = np.cumsum(np.asarray(hits)[np.argsort(-np.asarray(scores), kind="stable")])
    precision = np.maximum.accumulate((found / np.arange(1, len(found) + 1))[::-1])[::-1]
    at = np.searchsorted(found / targets, _RECALLS)
    return float(np.append(precision, 0.0)[at].mean())
