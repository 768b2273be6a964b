"""Pictures from anywhere, upright and in RGB: the pixels that Pillow's `convert("RGB")` gives.

A picture is opened lazily: its size is known from the header, its pixels are decoded when asked for.
Up to `MAX_WHOLE_PIXELS` it is decoded whole. Larger JPEG and PNG files are decoded at a fraction of
their size (never below `MAX_REDUCED_PIXELS` / 4, far above any target size), so that memory stays
bounded; larger files of other kinds are refused.
"""

import dataclasses
import io
import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin

from vl3_jax.errors import InputError
from vl3_jax.processing import png_strips

MAX_WHOLE_PIXELS = 100_000_000  # 400 MB in Pillow's four bytes a pixel
MAX_REDUCED_PIXELS = 2**25
_ORIENTATION = 0x0112
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
    """A picture not yet decoded.

    Attributes:
      name: for messages: the path, or what kind of object it was.
      height: upright, in pixels of the file.
      width: upright, in pixels of the file.
      notes: what a user should be told, one line each.
    """

    name: str
    height: int
    width: int
    _decode: Callable[[], Image.Image]
    notes: list[str] = dataclasses.field(default_factory=list)

    def load(self) -> Image.Image:
        """Upright RGB pixels. InputError when the file is damaged."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata; the pixels are what counts
                return self._decode()
        except (OSError, ValueError, SyntaxError, EOFError, IndexError) as error:
            raise InputError(f"{self.name}: damaged picture ({_one_line(error)}); replace the file") from error


def open_image(source: Any) -> ImageReader:
    """Opens a path, bytes, a binary file object, a `PIL.Image` or an array.

    Arrays are [h, w], [h, w, 1], [h, w, 3] or [h, w, 4]: uint8, uint16, or floats in 0..1. Alpha is dropped, of
    an animation the first frame is taken, 16-bit grey keeps its upper byte.

    Raises:
      InputError: missing or unreadable file, empty picture, too large to decode in bounded memory.
    """
    if isinstance(source, Image.Image):
        return _from_opener(lambda: source, "picture")
    if isinstance(source, np.ndarray):
        array = array_to_rgb(source, "picture array")
        return ImageReader("picture array", *array.shape[:2], lambda: Image.fromarray(array))
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        return _from_opener(lambda: _open(io.BytesIO(data), "picture bytes"), "picture bytes")
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        if not os.path.exists(name):
            raise InputError(f"{name}: no such picture file; check the path")
        if os.path.isdir(name):
            raise InputError(f"{name}: is a folder, not a picture; give a file, or show a folder of frames as a video")
        if not os.path.getsize(name):
            raise InputError(f"{name}: the file is empty (0 bytes); replace it")
        return _from_opener(lambda: _open(name, name), name)
    if hasattr(source, "read"):
        return open_image(source.read())
    raise InputError(f"a picture cannot be a {type(source).__name__}; give a path, bytes, a PIL image or an array")


def array_to_rgb(array: np.ndarray, name: str) -> np.ndarray:
    """[h, w], [h, w, 1 | 3 | 4] uint8, uint16 or float 0..1 -> [h, w, 3] uint8."""
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
    """RGB without regard to orientation; 16-bit grey keeps its upper byte where Pillow would clip it to white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(array_to_rgb(np.asarray(image).astype(np.uint16), "picture"))
    if image.mode == "I":
        array = np.asarray(image)
        if array.max() > 255:  # 16-bit PNG in older Pillow
            array = array >> 8
        return Image.fromarray(array.clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _open(file: str | io.BytesIO, name: str) -> Image.Image:
    """Opens lazily. JPEG and PNG go to their plugin, because `Image.open` refuses large ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for plugin in (JpegImagePlugin.JpegImageFile, PngImagePlugin.PngImageFile):
                if _starts_like(file, plugin):
                    return plugin(file)
            return Image.open(file)
        except Image.DecompressionBombError as error:
            raise InputError(f"{name}: {_too_large()}") from error
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"{name}: not a picture that can be read; convert it to PNG or JPEG") from error


def _starts_like(file: str | io.BytesIO, plugin: type) -> bool:
    if isinstance(file, str):
        with open(file, "rb") as opened:
            start = opened.read(8)
    else:
        start = file.getvalue()[:8]
    magic = b"\xff\xd8\xff" if plugin is JpegImagePlugin.JpegImageFile else b"\x89PNG\r\n\x1a\n"
    return start.startswith(magic)


def _from_opener(opener: Callable[[], Image.Image], name: str) -> ImageReader:
    """`opener` is called for the header now and again for the pixels, so that none are kept in between."""
    image = opener()
    width, height = image.size
    if not width or not height:
        raise InputError(f"{name}: {width} x {height} pixels; an empty picture shows nothing")
    orientation = _orientation(image)
    factor = _reduction(image, name)

    def decode() -> Image.Image:
        source = opener()
        pixels = _pixels(source, factor)
        turn = _UPRIGHT.get(orientation)
        return pixels if turn is None else pixels.transpose(turn)

    notes = [] if factor == 1 else [f"{name}: {width} x {height} pixels, decoded at 1/{factor} of its size"]
    return ImageReader(name, *((width, height) if orientation in _SIDEWAYS else (height, width)), decode, notes)


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow turns these itself
        return 1
    if image.format == "PNG":  # its own getexif would decode the whole file to look behind the pixels
        exif = png_strips.chunk_data(image.fp, b"eXIf") if getattr(image, "fp", None) else None
        if exif:
            image.info.setdefault("exif", b"Exif\0\0" + exif)
        return Image.Image.getexif(image).get(_ORIENTATION, 1)
    return image.getexif().get(_ORIENTATION, 1)


def _reduction(image: Image.Image, name: str) -> int:
    """By how much the picture must be reduced while decoding to bound memory: 1, or what `_pixels` can do."""
    width, height = image.size
    if width * height <= MAX_WHOLE_PIXELS or getattr(image, "fp", None) is None:
        return 1
    factor = math.ceil(math.sqrt(width * height / MAX_REDUCED_PIXELS))
    if image.format == "JPEG" and not image.info.get("progressive"):
        return min(8, 2 ** math.ceil(math.log2(factor)))
    if image.format == "PNG" and png_strips.readable(image.fp):
        return factor
    raise InputError(f"{name}: {_too_large(width, height)}")


def _pixels(image: Image.Image, factor: int) -> Image.Image:
    if factor > 1 and image.format == "PNG":
        return png_strips.reduced(image.fp, factor)
    if factor > 1:
        image.draft(None, (image.width // factor, image.height // factor))
    return to_rgb(image)


def _too_large(width: int | None = None, height: int | None = None) -> str:
    size = f"{width} x {height} pixels are" if width else "the picture is"
    return f"{size} too many to decode (limit {MAX_WHOLE_PIXELS:,} pixels); save it smaller, or as a baseline JPEG"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
