"""Cuts frames into patches in merge-block order, and joins them again."""

from collections.abc import Sequence

import numpy as np

from vl3_jax.processing.packed_batch import PATCH_DIM
from vl3_jax.processing.resize import PATCH

ChannelValues = Sequence[float] | np.ndarray

_SCALED = (np.arange(256) / 255).astype(np.float32)  # grey levels in 0..1, rounded once
_CHANNEL_DIM = PATCH * PATCH
_DIM, _GREY = 0.3, 70  # weight of a pruned patch's own pixels, blended with this grey level, which shows on black too


def patchify(frames: np.ndarray, merge: int = 1) -> np.ndarray:
    """Cuts frames of one size into patches.

    Args:
      frames: [t, h, w, 3] uint8; h and w are multiples of 14 * merge.
      merge: Side of a merge block in patches.

    Returns:
      [t * (h / 14) * (w / 14), 588] uint8. Frames follow each other. Within a frame, blocks of merge x merge patches
      are in raster order; within a block, patches are in raster order. The values of a patch are ordered channel,
      row, column.
    """
    count, height, width, channels = frames.shape
    rows, columns = height // (PATCH * merge), width // (PATCH * merge)
    blocks = frames.reshape(count, rows, merge, PATCH, columns, merge, PATCH, channels)
    return blocks.transpose(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, PATCH_DIM)


def unpatchify(patches: np.ndarray, patch_hw: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Joins the patches of one frame into an image in which pruned patches are greyed.

    Args:
      patches: [n, 588] uint8.
      patch_hw: [n, 2] int, row and column of each patch.
      kept: [n] bool, False for pruned patches.

    Returns:
      [h, w, 3] uint8.
    """
    rows, columns = patch_hw.max(axis=0) + 1
    image = np.zeros((rows, columns, PATCH, PATCH, 3), np.uint8)
    pixels = patches.reshape(-1, 3, PATCH, PATCH).transpose(0, 2, 3, 1)
    greyed = pixels * _DIM + (1 - _DIM) * _GREY
    image[patch_hw[:, 0], patch_hw[:, 1]] = np.where(kept[:, None, None, None], pixels, greyed)
    return image.transpose(0, 2, 1, 3, 4).reshape(rows * PATCH, columns * PATCH, 3)


def normalise(patches: np.ndarray, mean: ChannelValues, std: ChannelValues) -> np.ndarray:
    """Scales patches to 0..1 and normalises each channel.

    Args:
      patches: [..., 588] uint8.
      mean: [3] mean of each channel.
      std: [3] standard deviation of each channel.

    Returns:
      [..., 588] float32, (patches / 255 - mean) / std.
    """
    mean, std = (np.repeat(np.asarray(values, np.float32), _CHANNEL_DIM) for values in (mean, std))
    return (_SCALED[patches] - mean) / std
