"""DiffFP, the differential frame pruner: keeps the vision tokens of a video that differ from the frame before.

The function is written against the array API standard, so that the same code runs on NumPy arrays (data pipelines,
processors) and on JAX arrays (on device).
Source: arXiv 2501.13106, section 2.3, and the arithmetic of the released processor.
"""

from typing import Any, Protocol, TypeVar


class StandardArray(Protocol):
    """What is needed of an array here; the rest is found through its namespace of standard functions."""

    def __array_namespace__(self) -> Any: ...

    def __getitem__(self, key: Any, /) -> Any: ...


Array = TypeVar("Array", bound=StandardArray)

DEFAULT_THRESHOLD = 0.1
DEFAULT_MIN_TOKENS = 1


def keep_mask(blocks: Array, threshold: float = DEFAULT_THRESHOLD, min_tokens: int = DEFAULT_MIN_TOKENS) -> Array:
    """Marks the merge blocks whose mean absolute change from the previous frame exceeds the threshold.

    Args:
      blocks: [T, M, K] float; normalised pixels (-1..1) of T frames with M merge blocks each and K values per block
        (merge_size^2 * 588). The arithmetic runs in their dtype: pass bfloat16 to reproduce the bfloat16 pixels of
        the original implementation.
      threshold: Limit for 255 * mean|change| of the normalised values. The default 0.1 is a mean change of
        0.05 grey levels (0..255).
      min_tokens: Minimum number of blocks kept per frame. In a frame with fewer, its first `min_tokens` blocks are
        kept as well.

    Returns:
      [T, M] bool. The first frame is kept whole, so a single image is never pruned.
    """
    xp = blocks.__array_namespace__()
    change = xp.mean(xp.abs(blocks[1:] - blocks[:-1]), axis=-1) * 255
    first = xp.ones(blocks[:1, :, 0].shape, dtype=bool)
    keep = xp.concat([first, change > threshold], axis=0)
    too_few = xp.sum(keep, axis=1, keepdims=True) < min_tokens
    return keep | (too_few & (xp.arange(keep.shape[1])[None, :] < min_tokens))
