"""Target sizes of images and video frames, and the resampling to these sizes.

Sizes are (height, width) in pixels, multiples of 14 * merge. A budget of vision tokens, counted after merging, is
shared by all media of one prompt (official) or granted to each item (native).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from PIL import Image

from vl3_jax.errors import InputError

PATCH = 14
MIN_TOKENS = 16
MAX_TOKENS = 16_384
NATIVE_MAX_ASPECT = 200


@dataclasses.dataclass(frozen=True)
class ResizeItem:
    """An image or video before resizing.

    Attributes:
      height: Height in pixels.
      width: Width in pixels.
      merge: Spatial merge size.
      frames: Number of frames; 1 for an image.
      name: Name for messages.
    """

    height: int
    width: int
    merge: int
    frames: int = 1
    name: str = "image"

    @property
    def factor(self) -> int:
        """Side of a merge block in pixels."""
        return PATCH * self.merge


def target_sizes(
    items: Sequence[ResizeItem],
    preprocess: str = "official",
    min_tokens: int = MIN_TOKENS,
    max_tokens: int = MAX_TOKENS,
) -> list[tuple[int, int]]:
    """Computes the size to which each item of one prompt is resized.

    Args:
      items: All images and videos of the prompt, in any order.
      preprocess: "official" or "native".
      min_tokens: Minimum number of vision tokens to which an image or frame is enlarged; not applied by the official
        rule when merge sizes differ.
      max_tokens: Budget of vision tokens, shared by the prompt (official) or of each item (native).

    Returns:
      (height, width) of each item in pixels.

    Raises:
      InputError: Under the native rule, one side of an item is more than 200 times the other.
    """
    if preprocess == "native":
        return [_native_size(item, min_tokens, max_tokens) for item in items]
    if len({item.merge for item in items}) > 1:
        return _mixed_sizes(items, max_tokens)
    frames = sum(item.frames for item in items)  # each frame of the prompt gets an equal share of the budget
    return [_size(item, min_tokens, max_tokens * item.factor**2 // frames, enlarge_shrunk=True) for item in items]


def resize_image(
    image: Image.Image, size: tuple[int, int], resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Resizes to `size` = (height, width): antialiased, in uint8, exactly as the installed Pillow does."""
    return image.resize((size[1], size[0]), resample)


def resize_frame(
    image: Image.Image, size: tuple[int, int], resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """Resizes a video frame as `resize_image` does, but always the width before the height.

    That is the order of torchvision, with which the transformers port resizes videos, and of Pillow before 13. Pillow
    from 13 on resizes the height first where the width grows and the height shrinks; the rounding in between changes
    a fifth of the values, some by 8 grey levels.
    """
    if size[1] > image.width and size[0] < image.height:
        image = resize_image(image, (image.height, size[1]), resample)
    return resize_image(image, size, resample)


def _native_size(item: ResizeItem, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    if max(item.height, item.width) / min(item.height, item.width) > NATIVE_MAX_ASPECT:
        raise InputError(
            f"{item.name}: {item.width} x {item.height} pixels, a side over {NATIVE_MAX_ASPECT} times the other, which "
            f"native preprocessing refuses; crop it or use official preprocessing"
        )
    return _size(item, min_tokens, max_tokens * item.factor**2 // item.frames, enlarge_shrunk=False)


def _size(item: ResizeItem, min_tokens: int, max_pixels: int, enlarge_shrunk: bool) -> tuple[int, int]:
    """Rounds an item to whole blocks, and shrinks it to `max_pixels` or enlarges it to `min_tokens` in each frame.

    Where shrinking leaves fewer tokens than the minimum, `enlarge_shrunk` tells whether the minimum takes precedence.
    """
    blocks = _blocks(item, 1.0, round)
    shrinks = math.prod(blocks) * item.factor**2 > max_pixels
    if shrinks:
        blocks = _blocks(item, math.sqrt(item.height * item.width / max(max_pixels, 1)), math.floor)
    if math.prod(blocks) < min_tokens and (enlarge_shrunk or not shrinks):
        grow = math.sqrt(min_tokens * item.factor**2 / (item.height * item.width))
        blocks = math.ceil(item.height * grow / item.factor), math.ceil(item.width * grow / item.factor)
    return _to_pixels(blocks, item.factor)


def _mixed_sizes(items: Sequence[ResizeItem], max_tokens: int) -> list[tuple[int, int]]:
    """Applies the official rule for different merge sizes: one scale for all, from their unscaled token counts."""
    total = sum(item.frames * math.prod(_blocks(item, 1.0, math.ceil)) for item in items)
    shrink, rounding = (math.sqrt(total / max_tokens), math.floor) if total > max_tokens else (1.0, round)
    return [_to_pixels(_blocks(item, shrink, rounding), item.factor) for item in items]


def _blocks(item: ResizeItem, shrink: float, rounding: Callable[[float], int]) -> tuple[int, int]:
    """Returns height and width in merge blocks, after both sides are divided by `shrink`."""
    return rounding(item.height / shrink / item.factor), rounding(item.width / shrink / item.factor)


def _to_pixels(blocks: tuple[int, int], factor: int) -> tuple[int, int]:
    """Converts blocks to pixels, with at least one block per side: the reference fails on a side of 0."""
    return max(blocks[0], 1) * factor, max(blocks[1], 1) * factor
