"""Reads answers that are masks, and the masks of references: run lengths in COCO's form, by frame and object."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco

from vl3_jax.errors import InputError
from vl3_jax.processing.mask_files import decode_rle

RunLengths = Mapping[str, Any] | None  # None is a mask of nothing
_FAR = 10**5  # pixels
_FORM = 'a list with a list of run lengths, {"size": [height, width], "counts": "..."}, for each frame'


def masks_by_frame(answer: Any, frames: int) -> list[list[RunLengths]]:
    """Returns the run lengths of an answer, by frame and object.

    Args:
      answer: The answer, a JSON value; a text has no masks.
      frames: Number of frames that it must have.

    Raises:
      InputError: It is something else, or has masks of another number of frames.
    """
    if isinstance(answer, str):
        return [[] for _ in range(frames)]
    masks = answer.get("masks") if isinstance(answer, Mapping) else None
    if not isinstance(masks, list) or not all(isinstance(frame, list) for frame in masks):
        raise InputError(f'the answer has no masks; give {_FORM}, as "masks"')
    if len(masks) != frames:
        raise InputError(f"the answer has the masks of {len(masks)} frames, expected {frames}; give those of each")
    return masks


def unions(*sides: Sequence[RunLengths]) -> tuple[np.ndarray, ...]:
    """Returns the union of the masks on each side: arrays [h, w] bool of one size.

    Args:
      *sides: Masks of the answer and of the references in one frame. Where none has a size, it is one pixel.

    Raises:
      InputError: Their sizes differ, or they are no run lengths.
    """
    return tuple(masks.any(axis=0) for masks in stacks(*sides))


def stacks(*sides: Sequence[RunLengths]) -> tuple[np.ndarray, ...]:
    """As `unions`, but returns the masks of each side, [n, h, w] bool, without those of nothing."""
    decoded = [[_decoded(mask) for mask in side if mask is not None] for side in sides]
    sizes = list(dict.fromkeys(mask.shape for side in decoded for mask in side)) or [(1, 1)]
    if len(sizes) > 1:
        shown = " and ".join(f"{height} x {width}" for height, width in sizes)
        raise InputError(f"masks of one frame have {shown} pixels; give them at the size of the frame")
    return tuple(np.stack(side) if side else np.zeros((0, *sizes[0]), bool) for side in decoded)


def segmentation_rle(segmentation: Any, height: int, width: int) -> Mapping[str, Any]:
    """Returns the run lengths of the segmentation of an annotation of COCO, which may be polygons.

    Raises:
      ValueError: A polygon is none, or far outside the image.
    """
    if isinstance(segmentation, Mapping):
        return segmentation
    for polygon in segmentation or [()]:
        if len(polygon) < 6 or len(polygon) % 2 or not all(abs(number) <= _FAR for number in polygon):
            raise ValueError(f"a polygon of {len(polygon)} numbers; expected x, y of three points, at most {_FAR}")
    merged = coco.merge(coco.frPyObjects(segmentation, height, width))
    return {"size": [height, width], "counts": merged["counts"].decode("ascii")}


def _decoded(mask: Any) -> np.ndarray:
    try:
        return decode_rle(mask)
    except (KeyError, TypeError, ValueError) as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise InputError(f"a mask cannot be read ({reason}); give {_FORM}") from None
