"""Images at the size of a segmentation model's input, and masks at the size of the image."""

from typing import Literal

import numpy as np
from PIL import Image

from vl3_jax.processing.resampling import bilinear_matrix
from vl3_jax.processing.resize import resize_frame

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def input_pixels(image: Image.Image, size: int, resample: Literal["bilinear", "bicubic"]) -> np.ndarray:
    """Resizes an RGB image to a square, whatever its shape; antialiased, in uint8.

    Returns:
      Pixels, [size, size, 3] uint8.
    """
    return np.asarray(resize_frame(image, (size, size), _FILTERS[resample]))


def enlarge_masks(logits: np.ndarray, size: tuple[int, int], through: int | None = None) -> np.ndarray:
    """Resizes logits bilinearly, without antialiasing.

    Args:
      logits: Low-resolution logits, [..., low, low].
      size: Height and width.
      through: Height and width of a square that they are resized to before, as Sa2VA does.

    Returns:
      Logits, [..., height, width] float32.
    """
    low = logits.shape[-1]
    rows, columns = (bilinear_matrix(through or low, length) for length in size)
    if through:
        step = bilinear_matrix(low, through)
        rows, columns = rows @ step, columns @ step
    return rows @ logits.astype(np.float32) @ columns.T
