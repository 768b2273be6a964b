"""F, the similarity of the boundaries of two masks, by the rule of DAVIS; and J&F of a video."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import cv2
import numpy as np

from vl3_jax.evaluation.scorers.mask_overlap import Overlap

_TOLERANCE = 0.008  # of the diagonal


class VideoSimilarity(NamedTuple):
    """Means over the frames of one object, from 0 to 1.

    Attributes:
      region: J, the intersection over union.
      boundary: F.
    """

    region: float
    boundary: float

    @property
    def both(self) -> float:
        """J&F."""
        return (self.region + self.boundary) / 2


def boundary_similarity(predicted: np.ndarray, target: np.ndarray) -> float:
    """Returns F, the harmonic mean of the shares of each boundary that lie near the other.

    Near is a disk of 0.8 % of the image's diagonal, rounded up to a whole number of pixels.

    Args:
      predicted: Mask, [h, w] bool.
      target: Mask, [h, w] bool.

    Returns:
      From 0 to 1; 1 if neither mask has a boundary.
    """
    drawn, wanted = _boundary(predicted), _boundary(target)
    if not drawn.any() or not wanted.any():
        return float(drawn.any() == wanted.any())
    disk = _disk(math.ceil(_TOLERANCE * math.hypot(*target.shape)))
    near_drawn, near_wanted = (cv2.dilate(edge.astype(np.uint8), disk) > 0 for edge in (drawn, wanted))
    precision = np.count_nonzero(drawn & near_wanted) / np.count_nonzero(drawn)
    recall = np.count_nonzero(wanted & near_drawn) / np.count_nonzero(wanted)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def video_similarity(frames: Iterable[tuple[np.ndarray, np.ndarray]]) -> VideoSimilarity:
    """Returns J and F of an object, from its predicted mask and its target in each frame; 0 without frames."""
    values = [(Overlap.of(*pair).iou, boundary_similarity(*pair)) for pair in frames]
    return VideoSimilarity(*np.mean(values, axis=0).tolist()) if values else VideoSimilarity(0.0, 0.0)


def _boundary(mask: np.ndarray) -> np.ndarray:
    """Returns the pixels that differ from the one to the right, below, or below to the right; none of them outside."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def _disk(radius: int) -> np.ndarray:
    rows, columns = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return (rows**2 + columns**2 <= radius**2).astype(np.uint8)
