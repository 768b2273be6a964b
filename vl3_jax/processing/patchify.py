"""Cuts frames into patches in merge-block order, joins them again, and computes the DiffFP mask from uint8 patches."""

from collections.abc import Sequence

import numpy as np

from vl3_jax.processing import diff_pruning
from vl3_jax.processing.packed_batch import PATCH_DIM
from vl3_jax.processing.resize import PATCH

ChannelValues = Sequence[float] | np.ndarray

_SCALED = (np.arange(256) / 255).astype(np.float32)  # grey levels in 0..1, rounded once
_CHANNEL_DIM = PATCH * PATCH
_CHUNK_BYTES = 32 * 2**20
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


def pruning_mask(
    patches: np.ndarray,
    frames: int,
    merge: int,
    threshold: float,
    min_tokens: int,
    mean: ChannelValues,
    std: ChannelValues,
) -> np.ndarray:
    """Computes `diff_pruning.keep_mask` of the normalised float32 pixels without holding all of them in memory.

    With one std for all channels, the change of a block is a sum of integers, so nearly all blocks are decided exactly
    from uint8. Blocks whose change is within the float32 error of the threshold, and all blocks where the stds differ,
    go through the float32 arithmetic. The result is the same.

    Args:
      patches: [frames * blocks * merge^2, 588] uint8, as returned by `patchify`.
      frames: Number of frames.
      merge: Side of a merge block in patches.
      threshold: Limit for the change of a block, as in `diff_pruning.keep_mask`.
      min_tokens: Minimum number of blocks kept per frame, as in `diff_pruning.keep_mask`.
      mean: [3] mean of each channel.
      std: [3] standard deviation of each channel.

    Returns:
      [frames * blocks] bool.
    """
    blocks = patches.reshape(frames, -1, merge**2, PATCH_DIM)
    keep = np.ones(blocks.shape[:2], bool)
    frames_per_chunk = max(1, _CHUNK_BYTES // max(blocks[0].nbytes, 1))
    for start in range(1, frames, frames_per_chunk):
        stop = min(start + frames_per_chunk, frames)
        keep[start:stop] = _changed(blocks[start - 1 : stop], threshold, mean, std)
    too_few = keep.sum(axis=1) < min_tokens
    keep[too_few, :min_tokens] = True
    return keep.reshape(-1)


def _changed(blocks: np.ndarray, threshold: float, mean: ChannelValues, std: ChannelValues) -> np.ndarray:
    """Marks the blocks whose change from the frame before exceeds the threshold.

    Args:
      blocks: [t, m, merge^2, 588] uint8.
      threshold: Limit for the change of a block.
      mean: [3] mean of each channel.
      std: [3] standard deviation of each channel.

    Returns:
      [t - 1, m] bool.
    """
    before, after = blocks[:-1], blocks[1:]
    num_values = blocks.shape[2] * blocks.shape[3]
    difference = np.maximum(before, after) - np.minimum(before, after)
    change = difference.reshape(*difference.shape[:2], num_values).sum(axis=-1, dtype=np.uint32) / (num_values * std[0])
    keep = change > threshold
    # float32 normalises each value to within 1e-6, hence the mean change (times 255) to within 1e-3.
    uncertain = np.abs(change - threshold) < 1e-3 * max(1.0, threshold)
    if len(set(std)) > 1:
        uncertain[:] = True
    frame, block = np.nonzero(uncertain)
    for chunk in np.array_split(np.arange(len(frame)), len(frame) * num_values // _CHUNK_BYTES + 1):
        pair = np.stack([before[frame[chunk], block[chunk]], after[frame[chunk], block[chunk]]])
        pixels = normalise(pair, mean, std).reshape(2, len(chunk), num_values)
        keep[frame[chunk], block[chunk]] = diff_pruning.keep_mask(pixels, threshold, 0)[1]
    return keep
