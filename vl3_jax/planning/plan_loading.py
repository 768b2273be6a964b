"""Plans of loading: the programs that place a checkpoint's layers on a chip, compiled ahead of time."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from vl3_jax.checkpoint.loading import LAYERWISE_BYTES, layer_setter
from vl3_jax.parallel.topologies import GIB
from vl3_jax.planning.compiler import compile_and_analyze


@dataclasses.dataclass(frozen=True)
class LoadingPlan:
    """What loading needs on a chip.

    Attributes:
      peak: Most bytes of HBM at a time: what is loaded already, and the program that places the next layer.
      transient: Most bytes that such a program needs besides the leaf that it fills: the layer, and its temporaries.
      leaf: Path of the leaf of that program; "" if none is placed layer by layer.
    """

    peak: int
    transient: int
    leaf: str

    def as_json(self) -> dict[str, Any]:
        """Returns the figures as `vl3 plan --serve --json` prints them."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        largest = (
            f", at most {self.transient / 2**20:,.0f} MiB besides the weights, for {self.leaf}" if self.leaf else ""
        )
        return f"{self.peak / GIB:.2f} GiB at its peak{largest}"


def plan_loading(params: Mapping[str, Any]) -> LoadingPlan:
    """Compiles the programs with which `vl3_jax.checkpoint.load` places the parameters of a model.

    Args:
      params: Nested dict of the parameters' shapes with their shardings, over the devices of a topology.
    """
    leaves = flatten_dict(dict(params), sep="/")
    sizes = {path: sum(map(_bytes_on_chip, jax.tree.leaves(leaf))) for path, leaf in leaves.items()}
    resident = peak = transient = 0
    largest = ""
    # In the order of loading: what is not stacked, then the stacks, the largest first.
    for path in sorted(leaves, key=lambda path: (_is_stacked(path), -sizes[path])):
        parts = jax.tree.leaves(leaves[path])
        is_large = sum(math.prod(part.shape) * part.dtype.itemsize for part in parts) > LAYERWISE_BYTES
        if _is_stacked(path) and is_large:
            extra = sum(map(_transient, parts))
            peak = max(peak, resident + sizes[path] + extra)
            if extra > transient:
                transient, largest = extra, path
        resident += sizes[path]
    return LoadingPlan(max(peak, resident), transient, largest)


def _transient(stack: jax.ShapeDtypeStruct) -> int:
    """Returns the bytes on a chip that setting a layer needs besides the stack."""
    layer = jax.ShapeDtypeStruct((1, *stack.shape[1:]), stack.dtype, sharding=stack.sharding)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    analysis = compile_and_analyze(layer_setter(stack.sharding).lower(stack, layer, number))
    return max(analysis.peak - _bytes_on_chip(stack), _bytes_on_chip(layer))


def _is_stacked(path: str) -> bool:
    return "layers" in path.split("/")


def _bytes_on_chip(leaf: jax.ShapeDtypeStruct) -> int:
    assert leaf.sharding is not None
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
