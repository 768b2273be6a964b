"""Target sizes: how large a picture or a video's frames may be, and the resampling to that size.

Sizes are (height, width) in pixels, multiples of 14 * merge. A budget of vision tokens, counted after
merging, is shared by everything in one prompt (official) or granted to each item (native).
"""

import dataclasses
import math
from collections.abc import Sequence

from PIL import Image

from vl3_jax.errors import InputError

PATCH = 14
MIN_TOKENS = 16
MAX_TOKENS = 16_384
NATIVE_MAX_ASPECT = 200


@dataclasses.dataclass(frozen=True)
class ResizeItem:
    """A picture (frames = 1) or a video before resizing; `name` is for messages."""

    height: int
    width: int
    merge: int
    frames: int = 1
    name: str = "picture"

    @property
    def factor(self) -> int:
        return PATCH * self.merge


def target_sizes(
    items: Sequence[ResizeItem],
    preprocess: str = "official",
    min_tokens: int = MIN_TOKENS,
    max_tokens: int = MAX_TOKENS,
) -> list[tuple[int, int]]:
    """The size to which each item of one prompt is resized.

    Args:
      items: everything that is shown, in any order.
      preprocess: "official" or "native".
      min_tokens: a picture or frame is enlarged to at least this many tokens (not with mixed merge sizes).
      max_tokens: the budget, shared by the prompt (official) or of each item (native).

    Returns:
      (height, width) of each item.

    Raises:
      InputError: native, and a side is more than 200 times the other.
    """
    if preprocess == "native":
        return [_native(item, min_tokens, max_tokens) for item in items]
    if len({item.merge for item in items}) > 1:
        return _mixed(items, max_tokens)
    frames = sum(item.frames for item in items)
    return [_uniform(item, min_tokens, max_tokens * item.factor**2 // frames) for item in items]


def resize_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bicubic, antialiased, in uint8, to `size` = (height, width): exactly what the installed Pillow does."""
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def resize_frame(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The same for a video frame, width before height.

    That is the order of torchvision, which the transformers port resizes videos with, and of Pillow before 13. From
    13 on Pillow begins with the height where the width grows and the height shrinks, and rounding in between makes
    a fifth of the values differ, some by 8 grey levels.
    """
    if size[1] > image.width and size[0] < image.height:
        image = resize_image(image, (image.height, size[1]))
    return resize_image(image, size)


def _uniform(item: ResizeItem, min_tokens: int, max_pixels: int) -> tuple[int, int]:
    """Every item has the same merge size: an equal share of the budget for each frame of the prompt."""
    height, width, factor = item.height, item.width, item.factor
    min_pixels = min_tokens * factor**2
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max(max_pixels, 1))
        rows, columns = math.floor(height / shrink / factor), math.floor(width / shrink / factor)
    if rows * columns * factor**2 < min_pixels:  # also after shrinking: the minimum has the last word
        rows, columns = _enlarged(item, min_pixels)
    return _pixels(rows, columns, factor)


def _mixed(items: Sequence[ResizeItem], max_tokens: int) -> list[tuple[int, int]]:
    """Merge sizes differ: one scale for all, from the tokens that the items would have unscaled."""
    total = sum(
        item.frames * math.ceil(item.height / item.factor) * math.ceil(item.width / item.factor) for item in items
    )
    to_multiple, shrink = (math.floor, math.sqrt(total / max_tokens)) if total > max_tokens else (round, 1.0)
    return [
        _pixels(
            to_multiple(item.height / shrink / item.factor), to_multiple(item.width / shrink / item.factor), item.factor
        )
        for item in items
    ]


def _native(item: ResizeItem, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    height, width, factor = item.height, item.width, item.factor
    if max(height, width) / min(height, width) > NATIVE_MAX_ASPECT:
        raise InputError(
            f"{item.name}: {width} x {height} pixels, a side over {NATIVE_MAX_ASPECT} times the other, which "
            f"native preprocessing refuses; crop it or use official preprocessing"
        )
    min_pixels, max_pixels = min_tokens * factor**2, max_tokens * factor**2 // item.frames
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max(max_pixels, 1))
        rows, columns = math.floor(height / shrink / factor), math.floor(width / shrink / factor)
    elif rows * columns * factor**2 < min_pixels:
        rows, columns = _enlarged(item, min_pixels)
    return _pixels(rows, columns, factor)


def _enlarged(item: ResizeItem, min_pixels: int) -> tuple[int, int]:
    grow = math.sqrt(min_pixels / (item.height * item.width))
    return math.ceil(item.height * grow / item.factor), math.ceil(item.width * grow / item.factor)


def _pixels(rows: int, columns: int, factor: int) -> tuple[int, int]:
    """At least one block each way: the reference fails on a side of 0."""
    return max(rows, 1) * factor, max(columns, 1) * factor
