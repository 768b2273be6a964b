"""Named tensors in files: their interface, views of files, and fast copies of transposed tensors.

`TensorFiles.array(name)` is a view of the memory-mapped file if the file is local, so that reading a checkpoint uses no
anonymous memory.
"""

import abc
import dataclasses
import functools
import math
import mmap
import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np

from vl3_jax.errors import InputError
from vl3_jax.storage.paths import open_url

try:  # optional: its transpose is three times as fast as NumPy's
    import cv2
except ImportError:
    cv2 = None

# Dtypes by their names in a safetensors header; `FLOATS` are those that a model may be stored in.
SAFETENSORS_DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
FLOATS = {SAFETENSORS_DTYPES[name].name: SAFETENSORS_DTYPES[name] for name in ("BF16", "F16", "F32")}
_PANEL_BYTES = 2**18  # bytes of source rows copied at a time; they stay in the cache while their columns are written
_COPY_DTYPES = {2: np.uint16, 4: np.int32}  # by item size; both libraries copy these without changing the bits
_local = threading.local()
_mapped_files: "weakref.WeakSet[MappedFile]" = weakref.WeakSet()


def float_dtype(name: str) -> np.dtype:
    """Returns the dtype of a name such as "bfloat16" or "bf16"; raises InputError if it is not one of `FLOATS`."""
    aliases = {"bf16": "bfloat16", "f16": "float16", "fp16": "float16", "f32": "float32", "fp32": "float32"}
    if (dtype := FLOATS.get(aliases.get(name, name))) is None:
        raise InputError(f"dtype {name!r} is not supported; choose bfloat16, float16 or float32")
    return dtype


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor, and the path or URL of the file that contains it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFiles(abc.ABC):
    """Tensors by name.

    Attributes:
      infos: Shape, dtype and file of each tensor by name.
      paths: Paths or URLs of the files, in order, for fingerprints.
    """

    infos: Mapping[str, TensorInfo]
    paths: Sequence[str]

    @abc.abstractmethod
    def array(self, name: str) -> np.ndarray:
        """Returns the read-only tensor, as a view of the file where possible. Safe to call from several threads."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)


class MappedFile:
    """Local file of `size` bytes, memory-mapped by the first `view`."""

    def __init__(self, path: str | os.PathLike):
        self.path, self.size = path, os.path.getsize(path)

    @functools.cached_property
    def _map(self) -> mmap.mmap:
        with open(self.path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        _mapped_files.add(self)
        return mapped

    def release_pages(self) -> None:
        """Takes the pages that were read out of this process's memory; views stay valid, and read them again."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Returns some bytes of the file, and asks the kernel to read them ahead.

        Raises:
          InputError: The file is not of its size any more: beyond its end, reading would end the process.
        """
        if not os.path.exists(self.path) or os.path.getsize(self.path) != self.size:
            raise InputError(f"{self.path}: has changed or is gone while it was read; run the same command again")
        if nbytes:
            start = offset - offset % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start, offset + nbytes - start)
        return memoryview(self._map)[offset : offset + nbytes]


def release_pages() -> None:
    """Takes what was read of mapped files out of this process's memory; the kernel may keep it in its cache."""
    for file in list(_mapped_files):
        file.release_pages()


class RemoteFile:
    """File of `size` bytes behind an fsspec URL, read by byte ranges. Each call of `view` allocates one buffer."""

    def __init__(self, url: str):
        self._filesystem, self._key = open_url(url)
        self.size = self._filesystem.size(self._key)

    def view(self, offset: int, nbytes: int) -> memoryview:
        return memoryview(self._filesystem.cat_file(self._key, start=offset, end=offset + nbytes))


class Overlay(TensorFiles):
    """Union of several sets of tensors; with `replace`, tensors of a later set replace those of an earlier one."""

    def __init__(self, layers: Sequence[TensorFiles], replace: bool = False):
        self._owner: dict[str, TensorFiles] = {}
        for layer in layers:
            for name in layer:
                if name in self._owner and not replace:
                    first, second = self._owner[name].infos[name].file, layer.infos[name].file
                    raise InputError(f"{second}: {name} is in {first} too; remove one of the two files")
                self._owner[name] = layer
        self.infos = {name: layer.infos[name] for name, layer in self._owner.items()}
        self.paths = tuple(path for layer in layers for path in layer.paths)

    def array(self, name: str) -> np.ndarray:
        return self._owner[name].array(name)


class Renamed(TensorFiles):
    """Tensors under other names: `names` maps new names to old ones, and tensors that it omits are hidden."""

    def __init__(self, base: TensorFiles, names: Mapping[str, str]):
        self._base, self._names = base, dict(names)
        self.infos = {new: base.infos[old] for new, old in self._names.items()}
        self.paths = base.paths

    def array(self, name: str) -> np.ndarray:
        return self._base.array(self._names[name])


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


def contains_nan(array: np.ndarray) -> bool:
    """Returns whether a float array contains NaN; checks it in blocks that stay in the CPU cache."""
    flat = np.ascontiguousarray(array).reshape(-1)
    size = array.dtype.itemsize
    infinity, minus_infinity = (int(np.array(value, array.dtype).view(f"u{size}")[()]) for value in (np.inf, -np.inf))
    for start in range(0, flat.size, 2**18):
        block = flat[start : start + 2**18]
        # The bits of NaN, as integers, are above those of infinity: as signed integers for a positive sign, as
        # unsigned ones for a negative sign.
        if block.view(f"i{size}").max() > infinity or block.view(f"u{size}").max() > minus_infinity:
            return True
    return False


def bits(array: np.ndarray) -> np.ndarray:
    """Returns the bits of an array as unsigned integers of its shape, so that NaN equals NaN."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Returns whether two arrays have the same shape, dtype and bits; compares them in blocks of rows."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    a, b = np.atleast_1d(a), np.atleast_1d(b)
    blocks = (slice(start, start + 1024) for start in range(0, len(a), 1024))
    return all(np.array_equal(bits(a[block]), bits(b[block])) for block in blocks)
