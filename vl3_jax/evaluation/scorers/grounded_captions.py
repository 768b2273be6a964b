"""Grounded captions (GCG): phrases with masks against the phrases and masks of references."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vl3_jax.evaluation.scorers.mask_overlap import (
    Detections,
    average_precision,
    greedy_pairs,
    paired_iou,
    pairwise_iou,
)
from vl3_jax.evaluation.scorers.phrases import PhraseSimilarity

_LEAST_IOU, _LEAST_SIMILARITY = 0.5, 0.5


class GroundedImage(NamedTuple):
    """What the masks of one image contribute; JSON values, so that it may be kept with the answer.

    Attributes:
      ious: IoU of each predicted mask with each target.
      targets: Number of targets.
      recalled: Pairs whose masks overlap by half and whose phrases are alike.
    """

    ious: list[list[float]]
    targets: int
    recalled: int

    @property
    def table(self) -> np.ndarray:
        """The IoUs as an array, [predictions, targets]."""
        return np.reshape(
            np.asarray(self.ious, np.float64), (-1, self.targets) if self.targets else (len(self.ious), 0)
        )

    @property
    def paired(self) -> float:
        """Mean IoU of the pairs."""
        return paired_iou(self.table)


def compare_grounding(
    phrases: Sequence[str],
    masks: np.ndarray,
    wanted_phrases: Sequence[str],
    wanted_masks: np.ndarray,
    similarity: PhraseSimilarity,
    official: bool = False,
) -> GroundedImage:
    """Compares the masks of an answer, and the phrases that they belong to, with those of a reference.

    Args:
      phrases: Phrase of each predicted mask.
      masks: [predictions, h, w] bool.
      wanted_phrases: Phrase of each target, of all or of the first ones.
      wanted_masks: [targets, h, w] bool.
      similarity: Compares phrases.
      official: Whether the search for pairs ends, as that of the original, at the first pair of masks whose phrases
        differ, though there are others.
    """
    ious, alike = pairwise_iou(masks, wanted_masks), np.zeros((len(masks), len(wanted_masks)), bool)
    named = wanted_phrases[: len(wanted_masks)]
    alike[:, : len(named)] = similarity(phrases, named) >= _LEAST_SIMILARITY
    admissible = alike & (ious >= _LEAST_IOU)
    if official:
        fits = [admissible[pair] for pair in greedy_pairs(ious)]
        recalled = fits.index(False) if False in fits else len(fits)
    else:
        recalled = len(greedy_pairs(ious, admissible))
    return GroundedImage(ious.tolist(), len(wanted_masks), recalled)


def grounding_metrics(images: Iterable[GroundedImage]) -> dict[str, float]:
    """Returns mIoU, recall and AP50 in percent, over all images; every prediction has the same confidence."""
    images = list(images)
    tables = [image.table for image in images]
    targets = sum(image.targets for image in images)
    detections = [Detections(table, np.ones(len(table))) for table in tables]
    values: dict[str, Any] = {
        "mIoU": np.mean([image.paired for image in images]) if images else 0.0,
        "Recall": sum(image.recalled for image in images) / targets if targets else 0.0,
        "AP50": average_precision(detections),
    }
    return {name: 100 * float(value) for name, value in values.items()}
