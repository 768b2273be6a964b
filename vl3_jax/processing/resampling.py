"""Matrices that resample an axis of an image, in the conventions of PyTorch (half-pixel centres, clamped borders)."""

import functools

import numpy as np

_CUBIC_A = -0.75  # PyTorch's; Pillow's and jax.image's is -0.5


@functools.lru_cache(maxsize=64)
def bicubic_matrix(size: int, target: int) -> np.ndarray:
    """Returns the matrix of bicubic interpolation without antialiasing, [target, size] float32."""
    distances, columns = _neighbours(size, target, reach=2)
    return _gather(_cubic(np.abs(distances)), columns, size)


@functools.lru_cache(maxsize=64)
def bilinear_matrix(size: int, target: int, antialias: bool = False) -> np.ndarray:
    """Returns the matrix of bilinear interpolation, [target, size] float32.

    Args:
      size: Length of the axis.
      target: Length after resampling.
      antialias: Whether the filter widens where the axis shrinks.
    """
    if not antialias or target >= size:
        distances, columns = _neighbours(size, target, reach=1)
        return _gather(1 - np.abs(distances), columns, size)
    scale = size / target
    centres = (np.arange(target) + 0.5) * scale
    weights = np.maximum(1 - np.abs(np.arange(size)[None] + 0.5 - centres[:, None]) / scale, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _neighbours(size: int, target: int, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns distance and index of the 2 * reach source pixels around each target pixel, [target, 2 * reach]."""
    centres = (np.arange(target) + 0.5) * (size / target) - 0.5
    columns = np.floor(centres)[:, None] + np.arange(1 - reach, reach + 1)
    return columns - centres[:, None], np.clip(columns, 0, size - 1).astype(int)


def _gather(weights: np.ndarray, columns: np.ndarray, size: int) -> np.ndarray:
    matrix = np.zeros((len(weights), size))
    np.add.at(matrix, (np.arange(len(weights))[:, None], columns), weights)
    return matrix.astype(np.float32)


def _cubic(x: np.ndarray) -> np.ndarray:
    near = ((_CUBIC_A + 2) * x - (_CUBIC_A + 3)) * x**2 + 1
    far = _CUBIC_A * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, far)
