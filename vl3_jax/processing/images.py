"""Reads images from files, bytes, PIL images and arrays as upright RGB, with the pixels of Pillow's `convert("RGB")`.

An image is opened lazily: its size is read from the header, and its pixels are decoded on request. Images of up to
`MAX_WHOLE_PIXELS` pixels are decoded whole. Larger JPEG and PNG files are decoded at a fraction of their size (never
below `MAX_REDUCED_PIXELS` / 4, far above any target size), so that memory stays bounded; larger files of other
formats are refused.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar
from warnings import catch_warnings, simplefilter

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin

from vl3_jax.errors import InputError
from vl3_jax.processing import png_strips
from vl3_jax.processing.media_source import as_file, first_bytes, path_or_bytes

MAX_WHOLE_PIXELS = 100_000_000  # 400 MB at Pillow's four bytes per pixel
MAX_REDUCED_PIXELS = 2**25
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_PLUGINS = {b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile, b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile}
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
      warnings: Messages for the user, one line each.
      num_frames: 1, as for a video of one frame.
      timestamps: None; an image has no time.
    """

    num_frames: ClassVar[int] = 1
    timestamps: ClassVar[None] = None

    name: str
    height: int
    width: int
    _decode: Callable[[], Image.Image]
    warnings: list[str] = dataclasses.field(default_factory=list)

    def load(self) -> Image.Image:
        """Decodes the upright RGB pixels.

        Raises:
          InputError: The file is damaged.
        """
        try:
            with catch_warnings():
                simplefilter("ignore")  # Pillow warns of unusual metadata, which does not affect the pixels
                return self._decode()
        except (OSError, ValueError, SyntaxError, EOFError, IndexError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{self.name}: damaged image ({reason}); replace the file") from error


def open_image(source: Any) -> ImageReader:
    """Opens a path, bytes, a binary file object, a `PIL.Image` or an array.

    Arrays are [h, w], [h, w, 1], [h, w, 3] or [h, w, 4]: uint8, uint16, or floats in 0..1. Alpha is dropped, the first
    frame of an animation is used, and 16-bit grey keeps its upper byte.

    Raises:
      InputError: The file is missing or unreadable, the image is empty, or it is too large to decode in bounded memory.
    """
    if isinstance(source, Image.Image):
        return _from_opener(lambda: source, "image")
    if isinstance(source, np.ndarray):
        array = array_to_rgb(source, "image array")
        height, width, _ = array.shape
        return ImageReader("image array", height, width, lambda: Image.fromarray(array))
    data, name = path_or_bytes(source, "image", "image file", "a path, bytes, a PIL image or an array")
    if isinstance(data, str) and os.path.isdir(data):
        raise InputError(f"{name}: is a folder, not an image; give a file, or pass a folder of frames as a video")
    return _from_opener(lambda: _open(data, name), name)


def array_to_rgb(array: np.ndarray, name: str) -> np.ndarray:
    """Converts an array to RGB.

    Args:
      array: [h, w] or [h, w, 1 | 3 | 4]; uint8, uint16, or floats in 0..1.
      name: Name for messages.

    Returns:
      [h, w, 3] uint8.

    Raises:
      InputError: The shape, dtype or values are not those of an image.
    """
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise InputError(f"{name}: shape {array.shape}; give [height, width] or [height, width, 3]")
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            raise InputError(f"{name}: float values outside 0..1; scale them, or give uint8")
        array = np.round(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise InputError(f"{name}: values of type {array.dtype}; give uint8, uint16 or floats in 0..1")
    return np.ascontiguousarray(np.broadcast_to(array[..., :3], (*array.shape[:2], 3)))


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to RGB without applying its orientation.

    16-bit grey keeps its upper byte, where Pillow would clip it to white.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray(array_to_rgb(np.asarray(image).astype(np.uint16), "image"))
    if image.mode == "I":
        array = np.asarray(image)
        if array.max() > 255:  # 16-bit PNG in older Pillow
            array = array >> 8
        return Image.fromarray(array.clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _open(data: str | bytes, name: str) -> Image.Image:
    """Opens a file lazily. JPEG and PNG go to their plugin, because `Image.open` refuses large ones."""
    with catch_warnings():
        simplefilter("ignore")
        try:
            head = first_bytes(data, 8)
            opener = next((plugin for magic, plugin in _PLUGINS.items() if head.startswith(magic)), Image.open)
            return opener(as_file(data))
        except Image.DecompressionBombError as error:
            raise InputError(f"{name}: {_too_large()}") from error
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"{name}: not a readable image; convert it to PNG or JPEG") from error


def _from_opener(opener: Callable[[], Image.Image], name: str) -> ImageReader:
    """Creates a reader; `opener` is called now for the header and again for the pixels, so none are held in between."""
    image = opener()
    width, height = image.size
    if not width or not height:
        raise InputError(f"{name}: {width} x {height} pixels; the image is empty, replace it")
    orientation = _orientation(image)
    factor = _reduction_factor(image, name)

    def decode() -> Image.Image:
        pixels = _decode_rgb(opener(), factor)
        transpose = _UPRIGHT.get(orientation)
        return pixels if transpose is None else pixels.transpose(transpose)

    upright_size = (width, height) if orientation in _SIDEWAYS else (height, width)
    warnings = [] if factor == 1 else [f"{name}: {width} x {height} pixels, decoded at 1/{factor} of its size"]
    return ImageReader(name, *upright_size, decode, warnings)


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow rotates TIFF images itself
        return 1
    if image.format == "PNG":  # PngImageFile.getexif would decode the whole file to find a chunk behind the pixels
        file = _undecoded_file(image)
        exif = png_strips.chunk_data(file, b"eXIf") if file else None
        if exif:
            image.info.setdefault("exif", b"Exif\0\0" + exif)
        return Image.Image.getexif(image).get(_ORIENTATION, 1)
    return image.getexif().get(_ORIENTATION, 1)


def _reduction_factor(image: Image.Image, name: str) -> int:
    """Returns the factor by which the image is reduced while decoding to bound memory; 1 decodes it whole."""
    width, height = image.size
    file = _undecoded_file(image)
    if width * height <= MAX_WHOLE_PIXELS or file is None:
        return 1
    factor = math.ceil(math.sqrt(width * height / MAX_REDUCED_PIXELS))
    if image.format == "JPEG" and not image.info.get("progressive"):
        return min(8, 2 ** math.ceil(math.log2(factor)))
    if image.format == "PNG" and png_strips.readable(file):
        return factor
    raise InputError(f"{name}: {_too_large(width, height)}")


def _decode_rgb(image: Image.Image, factor: int) -> Image.Image:
    file = _undecoded_file(image)
    if factor > 1 and image.format == "PNG" and file:
        return png_strips.reduced(file, factor)
    if factor > 1:
        image.draft(None, (image.width // factor, image.height // factor))
    return to_rgb(image)


def _undecoded_file(image: Image.Image) -> BinaryIO | None:
    """Returns the open file of an image; None if its pixels are in memory."""
    return getattr(image, "fp", None)


def _too_large(width: int | None = None, height: int | None = None) -> str:
    size = f"{width} x {height} pixels are" if width else "its pixels are"
    return f"{size} too many to decode (limit {MAX_WHOLE_PIXELS:,} pixels); save it smaller, or as a baseline JPEG"
