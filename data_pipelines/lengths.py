"""How much room a sample takes, from the sizes of its media alone; and how an over-long one is shrunk.

The rule, in this order:

1. Media share `max_tokens` vision tokens by the processor's resize rule, as in any prompt.
2. If a picture or frame has more than `max_frame_patches` patches, or the media more patches or vision tokens than a
   row holds, or media and text are longer than a row, `max_tokens` of this sample is lowered until they fit. For a
   long text, media give way down to a quarter of the row.
3. What is still longer than the row is cut at its end, vision tokens and all.
4. Media that do not fit even at the smallest size make the sample a problem, "too long".
"""

import dataclasses
import functools
from collections.abc import Sequence

from data_pipelines.sample_errors import TOO_LONG, BadSampleError
from data_pipelines.settings import DataSettings
from vl3_jax.processing import resize
from vl3_jax.processing.packed_batch import BatchShape
from vl3_jax.processing.resize import PATCH

UNKNOWN = -1
_MEDIA_FLOOR = 4  # media keep at least 1/4 of a row's tokens when text is long
_TRIES = 40


@dataclasses.dataclass(frozen=True)
class MediaInfo:
    """What the index knows of a picture or video: size, frames shown, and vision tokens left after pruning."""

    is_video: bool
    height: int
    width: int
    frames: int = 1
    kept: int = UNKNOWN


@dataclasses.dataclass(frozen=True)
class SampleLengths:
    """Text tokens of a sample (everything that is no vision token) and its media."""

    text: int
    media: tuple[MediaInfo, ...] = ()


@dataclasses.dataclass(frozen=True)
class SampleSize:
    """What a sample takes of a row.

    Attributes:
      tokens: text and vision tokens.
      vision_tokens: of these, at most.
      patches: of all media.
      frames: (patches of a frame, how many) of each medium.
      budget: `max_tokens` with which the processor gives this.
      shrunk: the budget is lower than the settings'.
      cut: tokens cut off at the end, at most.
    """

    tokens: int
    vision_tokens: int
    patches: int
    frames: tuple[tuple[int, int], ...]
    budget: int
    shrunk: bool = False
    cut: int = 0


def compute_sample_size(lengths: SampleLengths, settings: DataSettings) -> SampleSize:
    """Applies the rule above. BadSampleError when the sample cannot be made to fit."""
    shape, limit = settings.shape, settings.processor.max_tokens
    if not lengths.media:
        tokens = min(lengths.text, shape.length)
        return SampleSize(tokens, 0, 0, (), limit, cut=lengths.text - tokens)
    budget, needed = limit, _needed(lengths.media, settings, limit)
    allowed = min(shape.vision_tokens, max(shape.length - lengths.text, shape.length // _MEDIA_FLOOR))
    for _ in range(_TRIES):
        excess = _excess(needed, allowed, settings)
        if excess <= 1 or budget <= 1:
            break
        budget = max(min(int(min(budget, needed.vision_tokens) / excess), budget - 1), 1)
        needed = _needed(lengths.media, settings, budget)
    if _excess(needed, shape.vision_tokens, settings) > 1:
        raise BadSampleError(
            TOO_LONG,
            f"{len(needed.frames)} media with {sum(count for _, count in needed.frames)} frames take {needed.patches} "
            f"patches and {needed.vision_tokens} vision tokens at their smallest; show fewer",
        )
    vision = needed.vision_tokens
    if budget == limit:  # pruning was counted at this size
        vision = sum(m.kept if m.kept != UNKNOWN else own for m, own in zip(lengths.media, needed.each, strict=True))
    tokens = min(lengths.text + vision, shape.length)
    return SampleSize(
        tokens,
        min(vision, tokens),
        needed.patches,
        needed.frames,
        budget,
        shrunk=budget < limit,
        cut=lengths.text + vision - tokens,
    )


@dataclasses.dataclass(frozen=True)
class _Needed:
    each: tuple[int, ...]  # vision tokens of each medium
    patches: int
    frames: tuple[tuple[int, int], ...]

    @property
    def vision_tokens(self) -> int:
        return sum(self.each)


def _needed(media: tuple[MediaInfo, ...], settings: DataSettings, budget: int) -> _Needed:
    config = settings.processor
    sizes = tuple((m.is_video, m.height, m.width, m.frames) for m in media)
    return _needed_for(sizes, config.image_merge, config.video_merge, config.preprocess, config.min_tokens, budget)


@functools.lru_cache(maxsize=2**16)
def _needed_for(
    media: tuple[tuple[bool, int, int, int], ...],
    image_merge: int,
    video_merge: int,
    preprocess: str,
    min_tokens: int,
    budget: int,
) -> _Needed:
    items = [
        resize.ResizeItem(height, width, video_merge if is_video else image_merge, frames)
        for is_video, height, width, frames in media
    ]
    sizes = resize.target_sizes(items, preprocess, min_tokens, budget)
    frames = tuple(
        ((height // PATCH) * (width // PATCH), item.frames) for item, (height, width) in zip(items, sizes, strict=True)
    )
    patches = [size * count for size, count in frames]
    each = tuple(count // item.merge**2 for item, count in zip(items, patches, strict=True))
    return _Needed(each, sum(patches), frames)


def _excess(needed: _Needed, allowed: int, settings: DataSettings) -> float:
    """By what factor the media are too large; 1 or less when they fit."""
    shape = settings.shape
    largest = max(size for size, _ in needed.frames)
    return max(
        needed.vision_tokens / allowed,
        needed.patches / (shape.patches * shape.vision_rows),
        largest / min(settings.max_frame_patches, shape.patches),
        1.01 if not _fits_alone(needed.frames, shape) else 0,
    )


def _fits_alone(frames: Sequence[tuple[int, int]], shape: BatchShape) -> bool:
    return assign_frames(frames, [shape.patches] * shape.vision_rows) is not None


def assign_frames(frames: Sequence[tuple[int, int]], free: Sequence[int]) -> list[int] | None:
    """Room left in each vision row after placing frames first-fit as `packed_batch.pack` does; None if they do not fit.

    Args:
      frames: (patches of a frame, how many) of each medium, in order.
      free: patches free in each vision row.
    """
    left = list(free)
    for size, count in frames:
        for row, space in enumerate(left):
            here = min(count, space // size)
            left[row] -= here * size
            count -= here
            if not count:
                break
        else:
            return None
    return left
