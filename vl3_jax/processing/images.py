"""Reads images from files, bytes, PIL images and arrays as upright RGB, transparent ones on white.

An image is opened lazily: its size is read from the header, and its pixels are decoded on request. Images of up to
`MAX_WHOLE_PIXELS` pixels are decoded whole. Larger JPEG and PNG files are decoded at a fraction of their size (never
below `MAX_REDUCED_PIXELS` / 4, far above any target size), so that memory stays bounded; larger files of other
formats are refused, and so are files of more than `MAX_PIXELS`, which would take a minute.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, BinaryIO, ClassVar

from PIL import Image

from vl3_jax.errors import InputError
from vl3_jax.processing import png_strips, raster_file, rgb_pixels
from vl3_jax.processing.media_source import path_or_bytes

MAX_WHOLE_PIXELS = 100_000_000  # 400 MB at Pillow's four bytes per pixel
MAX_REDUCED_PIXELS = 2**25
MAX_PIXELS = 2**30
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclasses.dataclass
class ImageReader:
    """An image that is not decoded yet.

    Attributes:
      name: Name for messages: the path, or the kind of object.
      height: Height of the upright image in pixels of the file.
      width: Width of the upright image in pixels of the file.
      warnings: Messages for the user, one line each; decoding may add some.
      note_transparency: Whether a transparent image adds one.
      num_frames: 1, as for a video of one frame.
      timestamps: None; an image has no time.
    """

    num_frames: ClassVar[int] = 1
    timestamps: ClassVar[None] = None

    name: str
    height: int
    width: int
    _decode: Callable[[], tuple[Image.Image, str | None]]
    warnings: list[str] = dataclasses.field(default_factory=list)
    note_transparency: bool = True

    def load(self) -> Image.Image:
        """Decodes the upright RGB pixels.

        Raises:
          InputError: The file is damaged.
        """
        with raster_file.refuse_unreadable(self.name):
            pixels, remark = self._decode()
        if remark == rgb_pixels.TRANSPARENT and not self.note_transparency:
            return pixels
        if remark and f"{self.name}: {remark}" not in self.warnings:
            self.warnings.append(f"{self.name}: {remark}")
        return pixels


def open_image(source: Any, kind: str = "image", note_transparency: bool = True) -> ImageReader:
    """Opens a path, bytes, a binary file object, a `PIL.Image` or an array.

    Arrays, which may be anything with `__array__`, are [h, w], [h, w, 1], [h, w, 3] or [h, w, 4], or have the channels
    first: uint8, uint16, or floats in 0..1. The first frame of an animation is used; `rgb_pixels.to_rgb` says what
    becomes of transparency and of values beyond 8 bits.

    Args:
      source: The image.
      kind: What the image is called where it has no path.
      note_transparency: Whether a transparent image gets a warning.

    Raises:
      InputError: The file is missing or unreadable, the image is empty, or it is too large to decode in bounded memory.
    """
    reader = _open(source, kind)
    reader.note_transparency = note_transparency
    return reader


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Turns pixels as their EXIF orientation says, which does not go on with them: they could be turned once more."""
    transpose = _UPRIGHT.get(orientation)
    if transpose is None:
        return image
    turned = image.transpose(transpose)
    turned.info = {}
    return turned


def upright_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    """Returns height and width that an image has once it is upright."""
    return (image.width, image.height) if orientation in _SIDEWAYS else (image.height, image.width)


def _open(source: Any, kind: str) -> ImageReader:
    if isinstance(source, Image.Image):
        return _from_opener(lambda: contextlib.nullcontext(source), kind)
    if rgb_pixels.is_array(source):
        image = rgb_pixels.array_to_image(source, f"{kind} array")
        return ImageReader(f"{kind} array", image.height, image.width, lambda: rgb_pixels.to_rgb(image))
    data, name = path_or_bytes(source, kind, f"{kind} file", "a path, bytes, a PIL image or an array")
    if isinstance(data, str) and os.path.isdir(data):
        raise InputError(f"{name}: is a folder, not an image; give a file, or pass a folder of frames as a video")
    return _from_opener(lambda: raster_file.opened(data, name), name)


def _from_opener(opener: Callable[[], AbstractContextManager[Image.Image]], name: str) -> ImageReader:
    """Creates a reader; `opener` is called now for the header and again for the pixels, so none are held in between."""
    with opener() as image:
        width, height = image.size
        if not width or not height:
            raise InputError(f"{name}: {width} x {height} pixels; the image is empty, replace it")
        orientation = raster_file.orientation(image)
        size = upright_size(image, orientation)
        factor = _reduction_factor(image, name)

    def decode() -> tuple[Image.Image, str | None]:
        with opener() as image:
            pixels, remark = _decode_rgb(image, factor)
        return upright(pixels, orientation), remark

    warnings = [] if factor == 1 else [f"{name}: {width} x {height} pixels, decoded at 1/{factor} of its size"]
    return ImageReader(name, *size, decode, warnings)


def _reduction_factor(image: Image.Image, name: str) -> int:
    """Returns the factor by which the image is reduced while decoding to bound memory; 1 decodes it whole."""
    width, height = image.size
    file = _undecoded_file(image)
    if width * height <= MAX_WHOLE_PIXELS or file is None:
        return 1
    limit, advice = MAX_PIXELS, "save it smaller"
    if width * height <= limit:
        factor = math.ceil(math.sqrt(width * height / MAX_REDUCED_PIXELS))
        if image.format == "JPEG" and not image.info.get("progressive"):
            return min(8, 2 ** math.ceil(math.log2(factor)))
        if image.format == "PNG" and png_strips.readable(file, factor):
            return factor
        limit, advice = MAX_WHOLE_PIXELS, "save it smaller, or as a baseline JPEG"
    raise InputError(f"{name}: {width} x {height} pixels are too many to decode (limit {limit:,} pixels); {advice}")


def _decode_rgb(image: Image.Image, factor: int) -> tuple[Image.Image, str | None]:
    file = _undecoded_file(image)
    if factor > 1 and image.format == "PNG" and file:
        return png_strips.reduced(file, factor)
    if factor > 1:
        image.draft(None, (image.width // factor, image.height // factor))
    return rgb_pixels.to_rgb(image)


def _undecoded_file(image: Image.Image) -> BinaryIO | None:
    """Returns the open file of an image; None if its pixels are in memory."""
    return getattr(image, "fp", None)
