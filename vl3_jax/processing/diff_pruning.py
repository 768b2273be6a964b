"""DiffFP, the differential frame pruner: which vision tokens of a video differ from the frame before.

One definition serves NumPy (data pipelines, processors) and JAX (on device): it is written against the
array API standard, and takes its functions from the array it is given.
Source: arXiv 2501.13106, section 2.3, and the released processor's arithmetic.
"""

from typing import TypeVar

Array = TypeVar("Array")

DEFAULT_THRESHOLD = 0.1
DEFAULT_MIN_TOKENS = 1


def keep_mask(blocks: Array, threshold: float = DEFAULT_THRESHOLD, min_tokens: int = DEFAULT_MIN_TOKENS) -> Array:
    """Marks the merge blocks whose mean absolute change from the previous frame exceeds the threshold.

    Args:
      blocks: [T, M, K] float; the normalised pixels (-1..1) of T frames, M merge blocks each, K values a
        block (merge_size^2 * 588). Their storage type is the type of the arithmetic: pass bfloat16 to
        reproduce the original's bfloat16 pixels.
      threshold: compared with 255 * mean|change| of the normalised values, so the default 0.1 is a mean
        change of 0.05 grey levels (0..255).
      min_tokens: where a frame keeps fewer blocks than this, its first `min_tokens` blocks are kept too.

    Returns:
      [T, M] bool. The first frame is kept whole, so a single picture is never pruned.
    """
    xp = blocks.__array_namespace__()
    change = xp.mean(xp.abs(blocks[1:] - blocks[:-1]), axis=-1) * 255
    first = xp.ones(blocks[:1, :, 0].shape, dtype=bool)
    keep = xp.concat([first, change > threshold], axis=0)
    too_few = xp.sum(keep, axis=1, keepdims=True) < min_tokens
    return keep | (too_few & (xp.arange(keep.shape[1])[None, :] < min_tokens))
