"""Copying a transposed view, which is most of the work of a conversion, at a good part of memory speed."""

import math
import threading

import numpy as np

try:  # three times as fast as NumPy here; without it everything still works
    import cv2
except ImportError:
    cv2 = None

_PANEL_BYTES = 2**18  # source rows moved at a time: they stay in the cache while their columns are written
_MOVED_AS = {2: np.uint16, 4: np.int32}  # what both libraries move without looking at the values
_local = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array in memory that this thread uses again at its next call with `name`.

    Fresh memory costs the kernel as much time as the copy itself.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    kept = getattr(_local, name, None)
    if kept is None or kept.nbytes < nbytes:
        setattr(_local, name, None)  # the old one goes before the new one comes
        kept = np.empty(nbytes, np.uint8)
        setattr(_local, name, kept)
    return kept[:nbytes].view(dtype).reshape(shape)


def copy_view(out: np.ndarray, view: np.ndarray) -> None:
    """`out[...] = view`, cast where the dtypes differ, in rows that stay in the cache.

    Args:
      out: C-contiguous or a block of columns of such an array.
      view: same shape, any strides.
    """
    pair = _as_matrix(view, out)
    if pair is None:
        out[...] = view
        return
    source, target = pair
    rows = max(8, _PANEL_BYTES // max(1, source.shape[1] * source.itemsize))
    for start in range(0, source.shape[0], rows):
        panel = source[start : start + rows]
        _transpose(panel.astype(target.dtype, copy=False), target[:, start : start + rows])


def _transpose(source: np.ndarray, target: np.ndarray) -> None:
    moved_as = _MOVED_AS[target.dtype.itemsize]
    source, target = source.view(moved_as), target.view(moved_as)
    # Views of one row or column have strides that cv2 cannot describe.
    if cv2 is None or 1 in source.shape:
        target[...] = source.T
    else:
        cv2.transpose(source, target)


def _as_matrix(view: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(source, target) matrices with `target = source.T`, rows of `source` contiguous; None if it is not one."""
    if view.dtype.itemsize not in _MOVED_AS or out.dtype.itemsize not in _MOVED_AS or 0 in view.shape:
        return None
    view, out = view.squeeze(), out.squeeze()
    order = sorted(range(view.ndim), key=lambda axis: -view.strides[axis])
    if not order or order[0] == 0 or order != [*range(order[0], view.ndim), *range(order[0])]:
        return None
    inner = order[0]
    columns, rows = int(np.prod(view.shape[:inner])), int(np.prod(view.shape[inner:]))
    try:
        source = view.transpose(order).reshape((rows, columns), copy=False)
        target = out.reshape((columns, rows), copy=False)
    except ValueError:  # not without a copy
        return None
    contiguous = source.strides[1] == source.itemsize and target.strides[1] == target.itemsize
    return (source, target) if contiguous else None
