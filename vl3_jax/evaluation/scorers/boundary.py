"""F, the similarity of the boundaries of two masks, by the rule of DAVIS."""

import math

import cv2
import numpy as np

_TOLERANCE = 0.008  # of the diagonal


def boundary_similarity(predicted: np.ndarray, target: np.ndarray) -> float:
    """Returns F, the harmonic mean of the shares of each boundary that lie near the other.

    Near is a distance of up to 0.8 % of the image's diagonal, rounded up to a whole number of pixels.

    Args:
      predicted: Mask, [h, w] bool.
      target: Mask, [h, w] bool.

    Returns:
      From 0 to 1; 1 if neither mask has a boundary.
    """
    drawn, wanted = _boundary(predicted), _boundary(target)
    if not drawn.any() or not wanted.any():
        return float(drawn.any() == wanted.any())
    near = math.ceil(_TOLERANCE * math.hypot(*target.shape))
    precision, recall = np.mean(_distance_to(wanted)[drawn] <= near), np.mean(_distance_to(drawn)[wanted] <= near)
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _boundary(mask: np.ndarray) -> np.ndarray:
    """Returns the pixels that differ from the one to the right, below, or below to the right; none of them outside."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def _distance_to(boundary: np.ndarray) -> np.ndarray:
    """Returns the distance of each pixel to a boundary, [h, w] float32."""
    return cv2.distanceTransform((~boundary).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
