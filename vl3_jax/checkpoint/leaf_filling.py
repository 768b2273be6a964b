"""Fills leaves of the parameters on the host, from the slices of a checkpoint.

A leaf consists of pieces: layers of a stacked one, or parts of a fused one (`vl3_jax.model.serving_layout`). Each is
read, cast or quantised, and transposed part by part into the buffer of the leaf, so that besides it there are only a
few parts in memory.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from vl3_jax.checkpoint.sources import CheckpointSource
from vl3_jax.checkpoint.tensors import scratch
from vl3_jax.model.quantize import channel_scale, largest_magnitude, outputs_first, rounded
from vl3_jax.model.serving_layout import Piece

Bounds = Sequence[tuple[int, int]]  # first index, and the one after the last, of each dimension
Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]  # `map`, or that of a pool of threads

_ALIGNMENT = 64  # bytes; the CPU backend uses a NumPy buffer of this alignment without copying it
_PART_BYTES = 16 * 2**20  # of float32 values that are quantised at a time


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf to load.

    Attributes:
      path: Its path in the parameters that are loaded.
      shape: Its shape.
      dtype: Its dtype, unless it is quantised.
      pieces: What it consists of.
      contracted: Dimensions that a product contracts, if the leaf is quantised; () if it is not.
      splits: Sizes that each dimension is split into before pieces are found in it, see `ServingLeaf`; () if none is.
      transposed: Whether the two dimensions are in the other order than in the pieces.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[Piece, ...]
    contracted: tuple[int, ...] = ()
    splits: tuple[tuple[int, ...], ...] = ()
    transposed: bool = False

    def split(self, bounds: Bounds) -> tuple["Leaf", Bounds]:
        """Returns the leaf with its dimensions in the order of its pieces and split, and the bounds of a region."""
        if not self.splits:
            return self, bounds
        shape, regions, contracted = [], [], []
        order = range(len(bounds))[:: -1 if self.transposed else 1]
        for axis, sizes in zip(order, self.splits, strict=True):
            start, stop = bounds[axis]
            inner = math.prod(sizes[1:])
            assert start % inner == stop % inner == 0, "the rules of sharding divide no dimension within a group"
            contracted += range(len(shape), len(shape) + len(sizes)) if axis in self.contracted else ()
            shape += sizes
            regions += [(start // inner, stop // inner), *((0, size) for size in sizes[1:])]
        return dataclasses.replace(
            self, shape=tuple(shape), contracted=tuple(contracted), splits=(), transposed=False
        ), regions

    @property
    def stacked(self) -> bool:
        """Whether the first dimension is that of layers."""
        return "layers" in self.path.split("/")

    @property
    def whole(self) -> Bounds:
        """Bounds of the whole leaf."""
        return tuple((0, size) for size in self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the leaf takes once it is loaded."""
        if not self.contracted:
            return math.prod(self.shape) * self.dtype.itemsize
        return math.prod(self.shape) + 4 * math.prod(_scale_shape(self.shape, self.contracted))

    def largest_slice(self, source: CheckpointSource) -> int:
        """Returns the stored bytes of the largest slice that the leaf is filled from."""
        return max(
            math.prod(source.leaves[piece.path].tensor(piece.layer).slice_shape) * source.dtypes[piece.path].itemsize
            for piece in self.pieces
        )


def fill(source: CheckpointSource, leaf: Leaf, bounds: Bounds, run: Run = map) -> np.ndarray:
    """Reads a region of a leaf into an aligned buffer of its dtype.

    Args:
      source: The checkpoint.
      leaf: The leaf, which is not quantised.
      bounds: The region.
      run: Applies a function to each piece.

    Raises:
      InputError: A slice of the checkpoint is damaged or cannot be read.
    """
    whole = aligned([stop - start for start, stop in bounds], leaf.dtype)
    ordered = whole.T if leaf.transposed else whole
    leaf, bounds = leaf.split(bounds)
    buffer = ordered.reshape([stop - start for start, stop in bounds], copy=False)

    def read(piece: Piece) -> None:
        found = _overlap(piece, leaf, bounds)
        if found is None:
            return
        index, part, size = found
        target = buffer[index]
        region = _source_region(part, size, source.leaves[piece.path].tensor(piece.layer).slice_shape)
        shape = tuple(each.stop - each.start for each in region)
        # Where one dimension of the piece is two of the leaf, a buffer of its own has the dimensions of the piece.
        out = target if target.shape == shape else np.empty(shape, leaf.dtype)
        source.read(piece.path, piece.layer, region, out)
        if out is not target:
            target[...] = out.reshape(target.shape)

    list(run(read, leaf.pieces))
    return whole


def fill_quantized(source: CheckpointSource, leaf: Leaf, run: Run = map) -> tuple[np.ndarray, np.ndarray]:
    """Quantises a leaf into aligned buffers; the results are those of `quantize_leaf`.

    Args:
      source: The checkpoint.
      leaf: The leaf, which has contracted dimensions.
      run: Applies a function to each piece.

    Returns:
      The values and scales of a `QuantizedKernel`.

    Raises:
      InputError: A slice of the checkpoint is damaged or cannot be read.
    """
    value_shape = [leaf.shape[axis] for axis in outputs_first(len(leaf.shape), leaf.contracted)]
    inputs = len(leaf.contracted)
    leaf, bounds = leaf.split(leaf.whole)
    contracted = leaf.contracted
    values = _inputs_last(aligned, leaf.shape, np.dtype(np.int8), contracted)
    scales = aligned(_scale_shape(leaf.shape, contracted), np.dtype(np.float32))

    def quantize(piece: Piece) -> None:
        found = _overlap(piece, leaf, bounds)
        if found is None:
            return
        targets = values[found[0]], scales[found[0]]
        shape = source.leaves[piece.path].tensor(piece.layer).slice_shape
        if targets[0].shape == shape:
            _quantize_slice(source, piece, contracted, *targets)
            return
        own = _inputs_last(np.empty, shape, np.int8, contracted), np.empty(_scale_shape(shape, contracted), np.float32)
        _quantize_slice(source, piece, contracted, *own)
        for target, part in zip(targets, own, strict=True):
            target[...] = part.reshape(target.shape)

    list(run(quantize, leaf.pieces))
    values = values.transpose(outputs_first(values.ndim, contracted)).reshape(value_shape, copy=False)
    return values, scales.reshape(*value_shape[:-inputs], *(1,) * inputs, copy=False)


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialised array whose memory the CPU backend can use as it is."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _inputs_last(allocate: Callable, shape: Sequence[int], dtype: Any, contracted: Sequence[int]) -> np.ndarray:
    """Returns an array of a shape whose contracted dimensions come last in memory, as in quantised values."""
    order = outputs_first(len(shape), contracted)
    return allocate([shape[axis] for axis in order], dtype).transpose(np.argsort(order))


def _scale_shape(shape: Sequence[int], contracted: Sequence[int]) -> tuple[int, ...]:
    return tuple(1 if axis in contracted else size for axis, size in enumerate(shape))


def _quantize_slice(
    source: CheckpointSource,
    piece: Piece,
    contracted: Sequence[int],
    values: np.ndarray,
    scales: np.ndarray,
) -> None:
    """Quantises a slice part by part; where a part has not all values of a channel, it is read twice."""
    read = source.reader(piece.path, piece.layer)
    axis, step = source.split(piece.path, piece.layer)

    def parts() -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...], np.ndarray]]:
        for region in _regions(values.shape, axis, step):
            size = [each.stop - each.start for each in region]
            part = _inputs_last(functools.partial(scratch, "quantize"), size, np.dtype(np.float32), contracted)
            read(region, part)
            channels = tuple(slice(None) if i in contracted else each for i, each in enumerate(region))
            yield region, channels, part

    def write_values(region: tuple[slice, ...], channels: tuple[slice, ...], part: np.ndarray) -> None:
        values[region] = rounded(part, scales[channels], out=part)

    if axis not in contracted:
        for region, channels, part in parts():
            scales[channels] = channel_scale(largest_magnitude(part, contracted))
            write_values(region, channels, part)
        return
    largest = np.zeros(scales.shape, np.float32)
    for _, channels, part in parts():
        np.maximum(largest[channels], largest_magnitude(part, contracted), out=largest[channels])
    scales[...] = channel_scale(largest)
    for each in parts():
        write_values(*each)


def _regions(shape: Sequence[int], axis: int, step: int) -> Iterator[tuple[slice, ...]]:
    """Divides an array along an axis into parts of a multiple of `step`."""
    row_bytes = 4 * math.prod(shape) // shape[axis]
    step *= max(1, _PART_BYTES // (row_bytes * step))
    for start in range(0, shape[axis], step):
        region = [slice(0, size) for size in shape]
        region[axis] = slice(start, min(start + step, shape[axis]))
        yield tuple(region)


def _overlap(
    piece: Piece, leaf: Leaf, bounds: Bounds
) -> tuple[tuple[slice | int, ...], Bounds, tuple[int, ...]] | None:
    """Finds what a piece has in a region of its leaf.

    Returns:
      The index of the common part in the region; its bounds in the piece, without the dimensions in which the piece is
      one element; and the shape of the piece. None if they have nothing in common.
    """
    index, part, size = [], [], []
    whole = (slice(None),) * (len(leaf.shape) - len(piece.index))
    for chosen, length, (start, stop) in zip((*piece.index, *whole), leaf.shape, bounds, strict=True):
        is_element = not isinstance(chosen, slice)
        first, last = (chosen, chosen + 1) if is_element else chosen.indices(length)[:2]
        low, high = max(start, first), min(stop, last)
        if low >= high:
            return None
        index.append(low - start if is_element else slice(low - start, high - start))
        if not is_element:
            part.append((low - first, high - first))
            size.append(last - first)
    return tuple(index), part, tuple(size)


def _source_region(part: Bounds, size: Sequence[int], slice_shape: Sequence[int]) -> tuple[slice, ...]:
    """Returns the region of a slice that a part of a piece is.

    Args:
      part: Bounds in the piece, several of whose dimensions may be one of the slice; only the first of these may be
        divided.
      size: Shape of the piece.
      slice_shape: Shape of the slice.
    """
    region, dimensions = [], iter(zip(part, size, strict=True))
    for length in slice_shape:
        (start, stop), covered = next(dimensions)
        while covered < length:
            inner, inner_size = next(dimensions)
            assert inner == (0, inner_size), "the rules of sharding divide no dimension within a group of heads"
            start, stop, covered = start * inner_size, stop * inner_size, covered * inner_size
        region.append(slice(start, stop))
    return tuple(region)
