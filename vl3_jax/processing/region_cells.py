"""Regions of an image as the vision tokens that lie in them."""

from collections.abc import Sequence

import cv2
import numpy as np

from vl3_jax.errors import InputError
from vl3_jax.processing.messages import Region, Turn
from vl3_jax.processing.packed_batch import Visual

LEAST_CELLS, MOST_CELLS = 4, 256  # vision tokens of a region


def region_cells(mask: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Returns the cells of a grid that a mask covers, in raster order.

    The mask is read at one pixel of each cell. Of more than `MOST_CELLS`, so many are taken at even distances; where
    there are fewer than `LEAST_CELLS`, the cell that the mask covers most is repeated.

    Args:
      mask: [h, w] bool, not empty.
      rows: Rows of the grid.
      columns: Columns of the grid.

    Returns:
      [n] int32, row * columns + column of each cell.
    """
    height, width = mask.shape
    read = mask[np.arange(rows)[:, None] * height // rows, np.arange(columns) * width // columns]
    cells = np.flatnonzero(read)
    if len(cells) > MOST_CELLS:
        cells = cells[np.arange(MOST_CELLS) * len(cells) // MOST_CELLS]
    if len(cells) < LEAST_CELLS:
        share = cv2.resize(mask.astype(np.float32), (columns, rows), interpolation=cv2.INTER_AREA)
        cells = np.append(cells, [share.argmax()] * (LEAST_CELLS - len(cells)))
    return cells.astype(np.int32)


def all_region_tokens(turns: Sequence[Turn], visuals: Sequence[Visual]) -> list[np.ndarray]:
    """Returns the vision tokens of each region of a conversation.

    Args:
      turns: The messages.
      visuals: Their images and videos.

    Raises:
      InputError: As `region_tokens`, or an image or video comes behind a region.
    """
    parts = [part for turn in turns for part in turn.parts if not isinstance(part, str)]
    regions = [part for part in parts if isinstance(part, Region)]
    if any(isinstance(part, Region) for part in parts[: len(parts) - len(regions)]):
        raise InputError("a region is in front of an image or video; put all regions behind the last of them")
    return [region_tokens(region, visuals, f"region {number}") for number, region in enumerate(regions, start=1)]


def region_tokens(region: Region, visuals: Sequence[Visual], name: str) -> np.ndarray:
    """Returns the vision tokens of a region, counted over all that the visuals keep.

    Args:
      region: The region.
      visuals: Images and videos of the conversation.
      name: What to call the region in errors.

    Raises:
      InputError: The region is empty, or of something that is no image.
    """
    if not 0 <= region.medium < len(visuals) or visuals[region.medium].grid[0] != 1:
        raise InputError(f"{name}: is in no image of the conversation; put the image before it")
    if region.mask.ndim != 2 or not region.mask.any():
        raise InputError(f"{name}: its mask is empty; give one with the region in it")
    visual = visuals[region.medium]
    rows, columns = (side // visual.merge for side in visual.grid[1:])
    before = sum(visual.num_tokens for visual in visuals[: region.medium])
    return before + region_cells(region.mask.astype(bool), rows, columns)
