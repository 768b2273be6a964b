"""The layout of the parameters for serving, and where its pieces come from.

Checkpoints and training hold each kernel of the layers in one stacked array. For serving, the products of one input are
one: q, k and v (`qkv`), and gate and up (`gate_up`). Each layer has arrays of its own ("llm/layers_0/..." in place of
"llm/layers/..."), and the layers run one after another. In a scan, a CPU or GPU would copy the parameters of a layer
before each product, and a TPU could not read those of the next product while one runs.

The embeddings keep their dtype. Where they are the output head too, an int8 copy of them, `llm/tied_head`, is that of
a quantised model.

The kernels of the decoder's layers are matrices, which no compiler needs to rearrange: `attn/qkv/kernel`
[K * (G + 2) * head_dim, D], for each key/value head the G queries of its group, its key and its value;
`attn/out/kernel` [H * head_dim, D]; `mlp/gate_up/kernel` [2 * F, D], in groups of a part of gate and one of up, so that
a mesh splits both alike. All others, and the tower's, keep their shapes.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from vl3_jax.model.config import ModelConfig, TextConfig
from vl3_jax.model.decoder import gate_groups
from vl3_jax.model.quantize import (
    TIED_HEAD,
    TRANSPOSED,
    QuantizedKernel,
    contracted_dimensions,
    outputs_first,
    quantize_leaf,
)
from vl3_jax.model.vl3 import abstract_params, param_axes
from vl3_jax.parallel.rules import Axis

EMBEDDING = "llm/embed/embedding"
_LAYER = re.compile(r"/layers_(\d+)/")
_FUSED_LEAF = re.compile(r"/(qkv|gate_up)/(kernel|bias)$")

Index = tuple[slice | int, ...]


class Piece(NamedTuple):
    """A part of a leaf that one layer of a leaf of training, or a whole leaf, fills.

    Attributes:
      path: Path of the leaf in the layout of training, its keys joined by "/".
      layer: Layer of a stacked leaf; None for a leaf that is not stacked.
      index: Part of the leaf for serving, reshaped to the sizes of `ServingLeaf.splits`. It has as many values as the
        piece, in the same order, but may split a dimension in two.
    """

    path: str
    layer: int | None
    index: Index


@dataclasses.dataclass(frozen=True)
class ServingLeaf:
    """A leaf of the layout for serving, before quantisation.

    Attributes:
      shape: Its shape.
      axes: Logical axis of each dimension (see `vl3_jax.parallel.rules`).
      splits: Sizes that each dimension is split into where pieces are found in it, (n,) for one that is not split. The
        second dimension of a transposed leaf comes first in it.
      transposed: Whether the leaf is a matrix [out, in]; the input comes first in its pieces.
      pieces: What it consists of. They do not overlap, and leave nothing out.
    """

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    splits: tuple[tuple[int, ...], ...]
    transposed: bool
    pieces: tuple[Piece, ...]

    @property
    def split_shape(self) -> tuple[int, ...]:
        """Shape of the leaf with its dimensions split."""
        return tuple(itertools.chain.from_iterable(self.splits))


@functools.lru_cache
def serving_leaves(config: ModelConfig, quantize: str | None = None) -> Mapping[str, ServingLeaf]:
    """Returns the leaves of the layout by path.

    Args:
      config: Sizes of the model.
      quantize: "int8" adds the output head of a model with tied embeddings as a leaf of its own.
    """
    shapes: dict[str, jax.ShapeDtypeStruct] = _flat(abstract_params(config, serving=True))
    axes: dict[str, tuple[Axis, ...]] = _flat(param_axes(config, serving=True))
    leaves = {}
    for path, leaf in shapes.items():
        splits = _splits(config.text, path, leaf.shape)
        dimensions = sum(map(len, splits))
        pieces = tuple(_pieces(config.text, path, dimensions))
        leaves[path] = ServingLeaf(leaf.shape, axes[path], splits, _is_transposed(path), pieces)
    if quantize and config.text.tie_word_embeddings:
        table = Piece(EMBEDDING, None, (slice(None), slice(None)))
        leaves[TIED_HEAD] = dataclasses.replace(leaves[EMBEDDING], pieces=(table,))
    return leaves


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves of a nested dict by path."""
    return flatten_dict(tree, sep="/")  # pyright: ignore[reportReturnType]


def _splits(text: TextConfig, path: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Returns the sizes that each dimension of a leaf is split into."""
    found = _FUSED_LEAF.search(path)
    splits: list[tuple[int, ...]] = [(size,) for size in shape]
    if _is_transposed(path):
        splits.reverse()
    if found and found[1] == "qkv":
        splits[-1] = (text.num_kv_heads, text.num_heads // text.num_kv_heads + 2, text.head_dim)
    elif found:
        splits[-1] = (gate_groups(text), 2, text.intermediate_size // gate_groups(text))
    elif path.startswith("llm/") and path.endswith("/attn/out/kernel"):
        splits[0] = (text.num_heads, text.head_dim)
    return tuple(splits)


def _is_transposed(path: str) -> bool:
    *_, module, kind = path.split("/")
    return module in TRANSPOSED and kind == "kernel"


def _pieces(text: TextConfig, path: str, dimensions: int) -> Iterator[Piece]:
    """Yields the pieces of a leaf that has so many dimensions once they are split."""
    found = _LAYER.search(path)
    source = _LAYER.sub("/layers/", path)
    for name, index in _parts(text, path, dimensions):
        yield Piece(_FUSED_LEAF.sub(rf"/{name}/\2", source), int(found[1]) if found else None, index)


def _parts(text: TextConfig, path: str, dimensions: int) -> Iterator[tuple[str, Index]]:
    """Yields the name of each module that a leaf combines, and its part of the leaf."""
    found = _FUSED_LEAF.search(path)
    if not found:
        yield "", (slice(None),) * dimensions
        return
    inputs, group = (slice(None),) * (found[2] == "kernel"), text.num_heads // text.num_kv_heads
    parts: list[tuple[str, slice | int]] = [("q", slice(0, group)), ("k", group), ("v", group + 1)]
    if found[1] == "gate_up":
        parts = [("gate", 0), ("up", 1)]
    for name, part in parts:
        yield name, (*inputs, slice(None), part, slice(None))


def to_serving(params: Mapping[str, Any], config: ModelConfig, quantize: str | None = None) -> dict[str, Any]:
    """Copies parameters of the layout of training into that for serving.

    Args:
      params: Nested dict of arrays; none is quantised.
      config: Sizes of the model.
      quantize: "int8" quantises the kernels of layers and output head.

    Returns:
      Nested dict of the new arrays.
    """
    source = _flat(params)

    def filled(path: str, leaf: ServingLeaf) -> Any:
        pieces = [
            source[piece.path] if piece.layer is None else source[piece.path][piece.layer] for piece in leaf.pieces
        ]
        array = jnp.zeros(leaf.split_shape, pieces[0].dtype)
        for piece, values in zip(leaf.pieces, pieces, strict=True):
            array = array.at[piece.index].set(jnp.reshape(values, array[piece.index].shape))
        array = array.reshape(leaf.shape[::-1]).T if leaf.transposed else array.reshape(leaf.shape)
        return quantize_leaf(path, array) if quantize else array

    leaves = serving_leaves(config, quantize)
    return unflatten_dict({path: filled(path, leaf) for path, leaf in leaves.items()}, sep="/")


def abstract_serving_params(
    config: ModelConfig, dtype: DTypeLike = jnp.float32, quantize: str | None = None
) -> dict[str, Any]:
    """Returns the parameters of the layout as `jax.ShapeDtypeStruct` leaves.

    Args:
      config: Sizes of the model.
      dtype: Dtype of what is not quantised.
      quantize: "int8" makes the kernels of layers and output head a `QuantizedKernel` of shapes; None keeps them.
    """
    leaves = {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in serving_leaves(config, quantize).items()}
    if quantize:
        leaves = {path: jax.eval_shape(functools.partial(quantize_leaf, path), leaf) for path, leaf in leaves.items()}
    return unflatten_dict(leaves, sep="/")


def serving_axes(config: ModelConfig, quantize: str | None = None) -> dict[str, Any]:
    """Returns the logical axes of each leaf of `abstract_serving_params`."""
    leaves: dict[str, Any] = {path: leaf.axes for path, leaf in serving_leaves(config, quantize).items()}
    if quantize:
        leaves = {path: _quantized_axes(path, axes) for path, axes in leaves.items()}
    return unflatten_dict(leaves, sep="/")


def _quantized_axes(path: str, axes: tuple[Axis, ...]) -> Any:
    contracted = contracted_dimensions(path, len(axes))
    if not contracted:
        return axes
    ordered = tuple(axes[dimension] for dimension in outputs_first(len(axes), contracted))
    return QuantizedKernel(ordered, ordered)  # pyright: ignore[reportArgumentType]
