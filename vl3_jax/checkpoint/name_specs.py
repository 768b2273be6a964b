"""Tensors of a checkpoint layout and the leaves that they fill: the entries of a name map.

Axes are rearranged in the notation of einops: `(H K) D -> D H K` turns a tensor of shape (heads*head_dim, width) into a
leaf of shape (width, heads, head_dim).
"""

import dataclasses
import functools
import math
import re

import numpy as np


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One Hugging Face tensor and the slice of a leaf that it corresponds to.

    Attributes:
      name: Name of the tensor.
      shape: Shape of the tensor.
      leaf: Path of the leaf.
      layer: Layer of the leaf, or None if the leaf is not stacked.
      slice_shape: Shape of the leaf without its layer axis.
      part: Part of the model, one of `PARTS`.
      axes: Axes of the tensor and of the slice, such as "(H K) D -> D H K".
      sizes: Size of each axis.
    """

    name: str
    shape: tuple[int, ...]
    leaf: str
    layer: int | None
    slice_shape: tuple[int, ...]
    part: str
    axes: str
    sizes: dict[str, int]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def to_leaf(self, tensor: np.ndarray) -> np.ndarray:
        """Returns a view of the tensor, or of some of its rows, with the axes of its leaf; never copies."""
        return self._rearrange(tensor, *self._sides())

    def to_tensor(self, leaf_slice: np.ndarray) -> np.ndarray:
        """Inverts `to_leaf`, also as a view."""
        return self._rearrange(leaf_slice, *reversed(self._sides()))

    def row_axis(self) -> int | None:
        """Returns the axis of the slice that is the tensor's first axis, or None if that axis is split or merged."""
        left, right = self._sides()
        return right.index(left[0]) if len(left[0]) == 1 and left[0] in right else None

    def outer_axis(self) -> int:
        """Returns the axis of the slice whose parts lie one after another in the tensor."""
        left, right = self._sides()
        return next(axis for axis, group in enumerate(right) if group.startswith(left[0][0]))

    def _sides(self) -> list[tuple[str, ...]]:
        return [groups(side) for side in self.axes.split(" -> ")]

    def _rearrange(self, array: np.ndarray, source: tuple[str, ...], target: tuple[str, ...]) -> np.ndarray:
        sizes = self.sizes | dict(zip(source, array.shape, strict=True))
        split, moved = "".join(source), "".join(target)
        array = array.reshape([sizes[axis] for axis in split])
        return array.transpose([split.index(axis) for axis in moved]).reshape(merged_shape(target, sizes))


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """One leaf of the parameter tree.

    Attributes:
      path: Path of the leaf, such as "llm/norm/scale".
      shape: Full shape, with the layer axis if the leaf is stacked.
      tensors: Tensors that fill the leaf, in layer order.
    """

    path: str
    shape: tuple[int, ...]
    tensors: tuple[TensorSpec, ...]

    @property
    def stacked(self) -> bool:
        return self.tensors[0].layer is not None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def part(self) -> str:
        return self.tensors[0].part

    def slice_shape(self, layer: int | None) -> tuple[int, ...]:
        """Returns the shape of a layer, or of the whole leaf if `layer` is None."""
        return self.shape if layer is None else self.shape[1:]

    def tensor(self, layer: int | None) -> TensorSpec:
        """Returns the tensor that fills a layer, or the whole leaf if `layer` is None."""
        return self.tensors[layer or 0]


@dataclasses.dataclass(frozen=True)
class NameMap:
    """Tensors and leaves of one layout for one model configuration.

    Attributes:
      tensors: Specs of the tensors by name.
      leaves: Specs of the leaves by path.
    """

    tensors: dict[str, TensorSpec]
    leaves: dict[str, LeafSpec]


@functools.lru_cache(maxsize=128)
def groups(side: str) -> tuple[str, ...]:
    """Splits `"D (H K)"` into `("D", "HK")`."""
    return tuple(group.strip("()").replace(" ", "") for group in re.findall(r"\([^)]*\)|\w", side))


def merged_shape(axes: tuple[str, ...], sizes: dict[str, int]) -> tuple[int, ...]:
    """Returns the shape of an array whose dimensions each merge some axes."""
    return tuple(math.prod(sizes[axis] for axis in group) for group in axes)
