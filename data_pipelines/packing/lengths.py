"""Computes how much of a row a sample needs, from the sizes of its media alone, and shrinks samples that are too long.

The rules, in this order:

1. The media share `max_tokens` vision tokens by the processor's resize rule, as in any prompt.
2. If an image or frame has more than `max_frame_patches` patches, or the media have more patches or vision tokens than
   a row holds, or media and text together are longer than a row, `max_tokens` of this sample is lowered until they
   fit. A long text reduces the media to no less than a quarter of the row.
3. A sample that is still longer than the row is cut at its end, vision tokens included.
4. A sample whose media do not fit even at their smallest size is bad, "too long".
"""

import dataclasses
import functools
from collections.abc import Sequence

from data_pipelines.sample_errors import TOO_LONG, BadSampleError
from data_pipelines.settings import DataSettings
from vl3_jax.processing import resize
from vl3_jax.processing.processor_config import ProcessorConfig
from vl3_jax.processing.resize import PATCH

BAD = -1  # the text tokens of a bad sample
UNKNOWN = -1
_MIN_MEDIA_DIVISOR = 4  # media keep at least 1/4 of a row's tokens when the text is long
_MAX_TRIES = 40


@dataclasses.dataclass(frozen=True)
class MediaInfo:
    """An image or video as the index stores it.

    Attributes:
      is_video: Whether it is a video.
      height: Height in pixels.
      width: Width in pixels.
      frames: Number of sampled frames; 1 for an image.
      kept: Vision tokens kept by pruning, or `UNKNOWN`.
    """

    is_video: bool
    height: int
    width: int
    frames: int = 1
    kept: int = UNKNOWN


@dataclasses.dataclass(frozen=True)
class SampleLengths:
    """Lengths of a sample before resizing.

    Attributes:
      text: Number of tokens that are not vision tokens; `BAD` for a bad sample.
      media: Its images and videos in order of appearance.
    """

    text: int
    media: tuple[MediaInfo, ...] = ()


@dataclasses.dataclass(frozen=True)
class SampleSize:
    """How much of a packed row a sample needs.

    Attributes:
      tokens: Text and vision tokens, at most.
      vision_tokens: Vision tokens, at most.
      patches: Patches of all media.
      frames: For each medium, (patches per frame, number of frames).
      budget: The processor's `max_tokens` that leads to these sizes.
      shrunk: Whether the budget is lower than the `max_tokens` of the settings.
      cut: Tokens cut off at the end, at most.
    """

    tokens: int
    vision_tokens: int
    patches: int
    frames: tuple[tuple[int, int], ...]
    budget: int
    shrunk: bool = False
    cut: int = 0


def compute_sample_size(lengths: SampleLengths, settings: DataSettings) -> SampleSize:
    """Applies the rules above.

    Raises:
      BadSampleError: The media do not fit a row even at their smallest size.
    """
    shape, limit = settings.shape, settings.processor.max_tokens
    if not lengths.media:
        tokens = min(lengths.text, shape.length)
        return SampleSize(tokens, 0, 0, (), limit, cut=lengths.text - tokens)
    media = tuple((m.is_video, m.height, m.width, m.frames) for m in lengths.media)
    budget, needed = limit, _needed(media, settings.processor, limit)
    allowed = min(shape.vision_tokens, max(shape.length - lengths.text, shape.length // _MIN_MEDIA_DIVISOR))
    for _ in range(_MAX_TRIES):
        excess = _excess(needed, allowed, settings)
        if excess <= 1 or budget <= 1:
            break
        budget = max(min(int(min(budget, needed.vision_tokens) / excess), budget - 1), 1)
        needed = _needed(media, settings.processor, budget)
    if _excess(needed, shape.vision_tokens, settings) > 1:
        raise BadSampleError(
            TOO_LONG,
            f"{len(needed.frames)} media with {sum(count for _, count in needed.frames)} frames take {needed.patches} "
            f"patches and {needed.vision_tokens} vision tokens at their smallest size; use fewer",
        )
    vision = needed.vision_tokens
    if budget == limit:  # the index counted pruning at this budget
        vision = sum(m.kept if m.kept != UNKNOWN else own for m, own in zip(lengths.media, needed.each, strict=True))
    whole = lengths.text + vision
    tokens = min(whole, shape.length)
    return SampleSize(
        tokens, min(vision, tokens), needed.patches, needed.frames, budget, shrunk=budget < limit, cut=whole - tokens
    )


@dataclasses.dataclass(frozen=True)
class _Needed:
    """What the media of a sample need under a given budget."""

    each: tuple[int, ...]  # vision tokens of each medium
    patches: int
    frames: tuple[tuple[int, int], ...]

    @property
    def vision_tokens(self) -> int:
        return sum(self.each)


@functools.lru_cache(maxsize=2**16)
def _needed(media: tuple[tuple[bool, int, int, int], ...], config: ProcessorConfig, budget: int) -> _Needed:
    """Resizes media, each (is_video, height, width, frames)."""
    items = [
        resize.ResizeItem(height, width, config.video_merge if is_video else config.image_merge, frames)
        for is_video, height, width, frames in media
    ]
    sizes = resize.target_sizes(items, config.preprocess, config.min_tokens, budget)
    frames = tuple(
        ((height // PATCH) * (width // PATCH), item.frames) for item, (height, width) in zip(items, sizes, strict=True)
    )
    patches = [size * count for size, count in frames]
    each = tuple(count // item.merge**2 for item, count in zip(items, patches, strict=True))
    return _Needed(each, sum(patches), frames)


def _excess(needed: _Needed, allowed: int, settings: DataSettings) -> float:
    """Returns the factor by which the media are too large; 1 or less if they fit."""
    shape = settings.shape
    return max(
        needed.vision_tokens / allowed,
        needed.patches / (shape.patches * shape.vision_rows),
        max(size for size, _ in needed.frames) / min(settings.max_frame_patches, shape.patches),
        1.01 if assign_frames(needed.frames, [shape.patches] * shape.vision_rows) is None else 0,
    )


def assign_frames(frames: Sequence[tuple[int, int]], free: Sequence[int]) -> list[int] | None:
    """Places frames into vision rows first-fit, exactly as `packed_batch.pack` does.

    Args:
      frames: For each medium in order, (patches per frame, number of frames).
      free: Free patches of each vision row.

    Returns:
      The free patches of each vision row afterwards; None if the frames do not fit.
    """
    left = list(free)
    for size, count in frames:
        for row, space in enumerate(left):
            fitting = min(count, space // size)
            left[row] -= fitting * size
            count -= fitting
            if not count:
                break
        else:
            return None
    return left
