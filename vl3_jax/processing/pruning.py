"""Prunes the vision tokens of a prompt's videos, by a threshold or to a budget.

`diff_pruning.keep_mask` says which tokens a threshold keeps; here the same is computed from uint8 patches, and a budget
is turned into the smallest threshold that keeps to it.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from vl3_jax.errors import SettingError
from vl3_jax.processing import diff_pruning
from vl3_jax.processing.packed_batch import PATCH_DIM, Visual
from vl3_jax.processing.patchify import ChannelValues, normalise
from vl3_jax.processing.processor_config import ProcessorConfig

_CHUNK_BYTES = 32 * 2**20
_CHANNELS = 3
_ERROR = 1e-3  # of a change in float32, where the pixels have a standard deviation of 0.5
_DIGITS = 4  # of a threshold that a budget chooses, after the point


def prune(
    visuals: Sequence[Visual], videos: Sequence[bool], config: ProcessorConfig
) -> tuple[list[Visual], float | None]:
    """Prunes the videos of a prompt; images, and first frames of videos, stay whole.

    Args:
      visuals: Images and videos with all their tokens.
      videos: Whether each of them is a video.
      config: Threshold, budget and smallest number of tokens of a frame.

    Returns:
      The images and videos, and the threshold that they were pruned with, None if they were not.

    Raises:
      SettingError: A budget that images, first frames and the smallest number of tokens of each frame exceed.
    """
    threshold, visuals = config.prune_threshold, list(visuals)
    if threshold is None:
        return visuals, None
    pruned = [index for index, visual in enumerate(visuals) if videos[index] and visual.grid[0] > 1]
    changes = {index: block_changes(visuals[index], config.image_std) for index in pruned}
    room = None
    if config.visual_budget is not None:
        total, minimum = sum(len(visual.keep) for visual in visuals), config.prune_min_tokens
        whole = total - sum(change.size for change in changes.values())
        needed = sum(len(change) * min(minimum, change.shape[1]) for change in changes.values())
        room = _tokens(config.visual_budget, total) - whole
        if room < needed:
            raise SettingError(
                "visual_budget",
                config.visual_budget,
                f"give {whole + needed} or more for images, first frames and {minimum} of each other frame, or lower "
                "max_visual_tokens or max_frames",
            )
        threshold = max(threshold, _smallest_threshold([*changes.values()], room - needed, minimum))
    while True:
        kept = {index: pruning_mask(visuals[index], threshold, config, changes[index]) for index in pruned}
        if room is None or sum(int(keep[1:].sum()) for keep in kept.values()) <= room:
            break
        # Blocks at the threshold may pass it in float32, and frames with fewer than their smallest number get others.
        threshold = round(threshold + _ERROR * max(1.0, threshold), _DIGITS)
    for index, keep in kept.items():
        visuals[index] = dataclasses.replace(visuals[index], keep=keep.reshape(-1))
    return visuals, threshold


def block_changes(video: Visual, std: ChannelValues) -> np.ndarray:
    """Computes the change of each merge block since the frame before, exactly, from sums of integers.

    Args:
      video: A video of T frames with M merge blocks each.
      std: [3] standard deviation of each channel.

    Returns:
      [T - 1, M] float64, 255 * mean|change| of the normalised values.
    """
    frames = video.grid[0]
    blocks = video.patches.reshape(frames, -1, video.merge**2, _CHANNELS, PATCH_DIM // _CHANNELS)
    weights = 1 / (video.merge**2 * PATCH_DIM * np.asarray(std, np.float64))
    changes = np.empty((frames - 1, blocks.shape[1]))
    chunk = max(1, _CHUNK_BYTES // max(blocks[0].nbytes, 1))
    for start in range(0, frames - 1, chunk):
        stop = min(start + chunk, frames - 1)
        before, after = blocks[start:stop], blocks[start + 1 : stop + 1]
        difference = np.maximum(before, after) - np.minimum(before, after)
        changes[start:stop] = difference.sum(axis=-1, dtype=np.uint32).sum(axis=2) @ weights
    return changes


def pruning_mask(
    video: Visual, threshold: float, config: ProcessorConfig, changes: np.ndarray | None = None
) -> np.ndarray:
    """Computes `diff_pruning.keep_mask` of the normalised float32 pixels without holding all of them in memory.

    Nearly all blocks are decided by their exact change. Those whose change is within the float32 error of the threshold
    go through the float32 arithmetic, so that the result is the same.

    Args:
      video: A video of T frames with M merge blocks each.
      threshold: Limit for the change of a block, as in `diff_pruning.keep_mask`.
      config: Normalisation, and smallest number of tokens of a frame.
      changes: What `block_changes` returns, if it is known.

    Returns:
      [T, M] bool.
    """
    mean, std, minimum = config.image_mean, config.image_std, config.prune_min_tokens
    changes = block_changes(video, std) if changes is None else changes
    keep = np.concatenate([np.ones((1, changes.shape[1]), bool), changes > threshold])
    error = _ERROR * max(1.0, threshold, 0.5 / min(std))
    frame, block = np.nonzero(np.abs(changes - threshold) < error)
    blocks = video.patches.reshape(*keep.shape, -1)
    for chunk in np.array_split(np.arange(len(frame)), len(frame) * blocks.shape[-1] // _CHUNK_BYTES + 1):
        pair = np.stack([blocks[frame[chunk], block[chunk]], blocks[frame[chunk] + 1, block[chunk]]])
        pixels = normalise(pair.reshape(2, -1, PATCH_DIM), mean, std).reshape(pair.shape)
        keep[frame[chunk] + 1, block[chunk]] = diff_pruning.keep_mask(pixels, threshold, 0)[1]
    keep[keep.sum(axis=1) < minimum, :minimum] = True
    return keep


class RunningBudget:
    """Prunes the frames of a live video, one by one as they come, to a share of all tokens that have come.

    The threshold is a running quantile: that share of the tokens of recent frames is above it. What earlier frames took
    too much, such as the first, which is kept whole, later ones save.

    Attributes:
      threshold: The threshold that the newest frame was pruned with.
    """

    def __init__(
        self,
        share: float,
        least: float = diff_pruning.DEFAULT_THRESHOLD,
        min_tokens: int = diff_pruning.DEFAULT_MIN_TOKENS,
        window: int = 32,
    ):
        """Begins with the first frame, of which all tokens are kept.

        Args:
          share: Share of the tokens to keep, above 0 and up to 1.
          least: Smallest threshold.
          min_tokens: Tokens that every frame keeps.
          window: Frames of the running quantile.
        """
        self.threshold, self._share, self._least, self._min_tokens = least, share, least, min_tokens
        self._recent: list[np.ndarray] = []
        self._window, self._seen, self._kept = window, 0, 0

    def keep(self, changes: np.ndarray) -> np.ndarray:
        """Returns which tokens of the next frame are kept.

        Args:
          changes: [M] float, the change of each merge block since the frame before, as `block_changes` computes it.
        """
        if not self._seen:
            self._seen = self._kept = len(changes)
        self._recent = [*self._recent[1 - self._window :], changes]
        self._seen += len(changes)
        self.threshold = max(self._least, float(np.quantile(np.concatenate(self._recent), 1 - self._share)))
        room = max(math.floor(self._share * self._seen) - self._kept, self._min_tokens)
        if room < len(changes):
            self.threshold = max(self.threshold, float(np.partition(changes, -room - 1)[-room - 1]))
        keep = changes > self.threshold
        if keep.sum() < self._min_tokens:
            keep[: self._min_tokens] = True
        self._kept += int(keep.sum())
        return keep


def _tokens(budget: float, total: int) -> int:
    """Returns a budget in tokens: up to 1, it is a share of them all."""
    return math.floor(budget * total) if budget <= 1 else int(budget)


def _smallest_threshold(changes: Sequence[np.ndarray], room: int, minimum: int) -> float:
    """Returns the smallest threshold that keeps to a budget, in one pass.

    Args:
      changes: Changes of the blocks of each video after its first frame, [T - 1, M].
      room: Tokens that they may have besides the smallest number of each frame.
      minimum: Smallest number of tokens of a frame: as many of its largest changes count as kept anyway.
    """
    others = [np.sort(change, axis=1)[:, : max(change.shape[1] - minimum, 0)].ravel() for change in changes]
    sorted_out = sum(map(len, others)) - room
    if sorted_out <= 0:
        return 0.0
    limit = np.partition(np.concatenate(others), sorted_out - 1)[sorted_out - 1]
    return math.ceil(limit * 10**_DIGITS) / 10**_DIGITS
