"""Converts the pixels of an image or array to 8-bit RGB: transparency on white, wide ranges of values scaled."""

from typing import Any

import numpy as np
from PIL import Image

from vl3_jax.errors import InputError

TRANSPARENT = "transparent; shown on white"
_WHITE = (255, 255, 255)
_CHANNELS = (1, 3, 4)
# Tags of TIFF.
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
_WHITE_IS_ZERO = 0


def to_rgb(image: Image.Image) -> tuple[Image.Image, str | None]:
    """Converts an image to RGB without applying its orientation.

    Transparent pixels are composited on white, exactly as the transformers port does. 16-bit grey keeps its upper byte,
    floats in 0..1 become 0..255, and values that are no bytes are scaled from their smallest to their largest.
    Everything else equals Pillow's `convert("RGB")`.

    Returns:
      The image, and a remark about transparency or scaling, or None.

    Raises:
      ValueError: A pixel is not a number.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey_to_rgb(image)
    if not image.has_transparency_data:
        return image.convert("RGB"), None
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema()[0] == 255:
        return rgba.convert("RGB"), None
    background = Image.new("RGB", image.size, _WHITE)
    background.paste(rgba, mask=rgba)  # the values of Image.alpha_composite, in half the memory
    return background, TRANSPARENT


def array_to_image(array: Any, name: str) -> Image.Image:
    """Converts an array to an image.

    Args:
      array: Anything with `__array__`: [h, w] or [h, w, 1 | 3 | 4], or with the channels first; uint8, uint16, or
        floats in 0..1.
      name: Name for messages.

    Returns:
      An image of mode L, RGB or RGBA.

    Raises:
      InputError: The shape, dtype or values are not those of an image.
    """
    array = as_numpy(array, name)
    if array.ndim == 3 and array.shape[-1] not in _CHANNELS and array.shape[0] in _CHANNELS:
        array = np.moveaxis(array, 0, -1)
    channels = array.shape[-1] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in _CHANNELS or 0 in array.shape:
        raise InputError(f"{name}: shape {array.shape}; give [height, width] or [height, width, 3]")
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif "float" in array.dtype.name:
        array = array if array.dtype.kind == "f" else array.astype(np.float32)  # NumPy cannot round bfloat16
        if not (array.min() >= 0 and array.max() <= 1):
            raise InputError(f"{name}: float values outside 0..1, or NaN; scale them, or give uint8")
        array = np.round(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise InputError(f"{name}: values of type {array.dtype}; give uint8, uint16 or floats in 0..1")
    return Image.fromarray(np.ascontiguousarray(array.squeeze(-1) if array.ndim == 3 and channels == 1 else array))


def is_array(source: Any) -> bool:
    """Returns whether a source is an array of any library; the strings of NumPy are texts."""
    return hasattr(source, "__array__") and not isinstance(source, str | bytes)


def as_numpy(array: Any, name: str) -> np.ndarray:
    """Returns anything with `__array__`, such as a JAX array or a torch tensor, as a NumPy array.

    Raises:
      InputError: It cannot be converted, for example because its values are on another device.
    """
    try:
        return np.asarray(array)
    except Exception as error:  # each library raises its own
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{name}: {type(array).__name__} is not readable as an array ({reason})") from error


def _grey_to_rgb(image: Image.Image) -> tuple[Image.Image, str | None]:
    """Converts grey of more than 8 bits."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("some pixels are not numbers")
    grey, remark = None, None
    if image.mode.startswith("I;16"):
        (bits,) = tags.get(_BITS_PER_SAMPLE, (16,))
        grey = values >> bits - 8
    elif image.mode == "F" and low >= 0 and high <= 1:
        grey = np.round(values * np.float32(255))
    elif image.mode == "I" and low >= 0 and 255 < high < 2**16:  # 16 bits
        grey = values >> 8
    elif low >= 0 and high <= 255 and (image.mode == "I" or (values == np.round(values)).all()):
        grey = values
    else:
        grey = _stretched(values, float(low), float(high))
        remark = f"values from {low:g} to {high:g}, shown from black to white"
    grey = grey.astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int) and (values == transparent).any():
        grey[values == transparent] = 255
        remark = TRANSPARENT
    return Image.fromarray(grey).convert("RGB"), remark


def _stretched(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scales low..high to 0..255, a few rows at a time to bound the memory."""
    scale = 255 / ((high - low) or 1)
    parts = np.array_split(values, len(values) // 256 + 1)
    return np.concatenate([np.round((part.astype(np.float64) - low) * scale).astype(np.uint8) for part in parts])
