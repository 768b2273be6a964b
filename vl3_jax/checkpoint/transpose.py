"""Fast copies of transposed views, which are most of the work of a conversion."""

import math
import threading

import numpy as np

try:  # optional: its transpose is three times as fast as NumPy's
    import cv2
except ImportError:
    cv2 = None

_PANEL_BYTES = 2**18  # bytes of source rows copied at a time; they stay in the cache while their columns are written
_COPY_DTYPES = {2: np.uint16, 4: np.int32}  # by item size; both libraries copy these without changing the bits
_local = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialised array whose memory this thread reuses at its next call with the same `name`.

    Allocating new memory takes the kernel as long as the copy itself.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = getattr(_local, name, None)
    if buffer is None or buffer.nbytes < nbytes:
        setattr(_local, name, None)  # frees the old buffer before the new one is allocated
        buffer = np.empty(nbytes, np.uint8)
        setattr(_local, name, buffer)
    return buffer[:nbytes].view(dtype).reshape(shape)


def copy_view(out: np.ndarray, view: np.ndarray) -> None:
    """Computes `out[...] = view`, with a cast if the dtypes differ, in blocks of rows that stay in the CPU cache.

    Args:
      out: Array to fill, C-contiguous or a block of columns of such an array.
      view: Array of the same shape with any strides.
    """
    matrices = _as_matrices(view, out)
    if matrices is None:
        out[...] = view
        return
    source, target = matrices
    rows = max(8, _PANEL_BYTES // max(1, source.shape[1] * source.itemsize))
    for start in range(0, source.shape[0], rows):
        panel = source[start : start + rows]
        _transpose(panel.astype(target.dtype, copy=False), target[:, start : start + rows])


def _transpose(source: np.ndarray, target: np.ndarray) -> None:
    copy_dtype = _COPY_DTYPES[target.dtype.itemsize]
    source, target = source.view(copy_dtype), target.view(copy_dtype)
    # Views of one row or column have strides that cv2 does not support.
    if cv2 is None or 1 in source.shape:
        target[...] = source.T
    else:
        cv2.transpose(source, target)


def _as_matrices(view: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Reshapes the copy to a transpose of matrices, `target = source.T`, without copying.

    Returns:
      The matrices (source, target), with contiguous rows, or None if the copy is not such a transpose.
    """
    if view.dtype.itemsize not in _COPY_DTYPES or out.dtype.itemsize not in _COPY_DTYPES or 0 in view.shape:
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
    except ValueError:  # the reshape needs a copy
        return None
    contiguous = source.strides[1] == source.itemsize and target.strides[1] == target.itemsize
    return (source, target) if contiguous else None
