"""Low-rank adapters (LoRA, arXiv 2106.09685) on the kernels whose paths match patterns.

The official trainer's defaults are rank 64, alpha 16 and a dropout of 0.05 on the input of the adapters. There is no
dropout here, so that a step needs no random numbers.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vl3_jax.errors import InputError
from vl3_jax.kernels.einsum import einsum
from vl3_jax.model.linear import LoraKernel
from vl3_jax.training.groups import kernel_sides, map_paths

RANK = 64
ALPHA = 16.0
# All linear layers of the decoder but the output head.
LLM: tuple[str, ...] = (r"llm/layers/attn/(q|k|v|out)/kernel", r"llm/layers/mlp/(gate|up|down)/kernel")
# Kernels of the tower that the official trainer adapts, because PEFT finds module names of the decoder there.
TOWER: tuple[str, ...] = (r"vision/layers/attn/(q|k|v)/kernel",)


def add_adapters(
    params: Any, key: jax.Array, patterns: Sequence[str] = LLM, rank: int = RANK, alpha: float = ALPHA
) -> Any:
    """Replaces each kernel whose whole path matches a pattern by a `LoraKernel` that computes the same function.

    As in PEFT, `a` is initialised uniformly in +-1/sqrt(fan in) and `b` with zeros; both are float32.

    Args:
      params: Tree of parameters, or of their shapes under `jax.eval_shape`.
      key: Random key, folded with the path of each kernel to initialise its `a`.
      patterns: Regular expressions over paths such as "llm/layers/attn/q/kernel".
      rank: Rank of the adapters.
      alpha: Numerator of the scale: an adapter adds alpha / rank * a b to its kernel.

    Raises:
      InputError: A pattern matches no kernel, or the rank is less than 1.
    """
    if rank < 1:
        raise InputError(f"the rank of adapters is {rank}; give at least 1")
    unused = set(patterns)

    def adapt(path: str, kernel: Any) -> Any:
        matching = [pattern for pattern in patterns if path.endswith("/kernel") and re.fullmatch(pattern, path)]
        unused.difference_update(matching)
        if not matching:
            return kernel
        stack, in_shape, out_shape = kernel_sides(path, kernel.shape)
        bound = math.prod(in_shape) ** -0.5
        path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = jax.random.uniform(path_key, (*stack, *in_shape, rank), jnp.float32, -bound, bound)
        return LoraKernel(kernel, a, jnp.zeros((*stack, rank, *out_shape), jnp.float32), alpha / rank)

    adapted = map_paths(adapt, params, is_leaf=_is_adapted)
    if unused:
        raise InputError(f"adapters: no kernel matches {min(unused)!r}; give paths such as llm/layers/attn/q/kernel")
    return adapted


def merge_adapters(params: Any) -> Any:
    """Returns plain parameters: base + scale * a b, summed in float32 and cast to the type of the base."""

    def merge(kernel: Any) -> Any:
        if not _is_adapted(kernel):
            return kernel
        base, a, b = kernel.base, kernel.a.astype(jnp.float32), kernel.b.astype(jnp.float32)
        stack, rank = base.shape[: a.ndim + b.ndim - 2 - base.ndim], a.shape[-1]
        product = einsum("...ir,...ro->...io", a.reshape(*stack, -1, rank), b.reshape(*stack, rank, -1))
        return (base.astype(jnp.float32) + kernel.scale * product.reshape(base.shape)).astype(base.dtype)

    return jax.tree.map(merge, params, is_leaf=_is_adapted)


def remove_adapters(params: Any) -> Any:
    """Returns the parameters without their adapters."""
    return jax.tree.map(lambda node: node.base if _is_adapted(node) else node, params, is_leaf=_is_adapted)


def adapter_axes(params: Any, axes: Any) -> Any:
    """Returns the logical axes of parameters with adapters: those of the adapted kernels, None for the rank.

    Args:
      params: Tree of arrays or shapes, which may hold adapters.
      axes: Logical axes of the plain tree, from `vl3_jax.model.param_axes`.
    """

    def expand(path: str, kernel: Any, names: Any) -> Any:
        if not _is_adapted(kernel):
            return names
        stack, in_axes, out_axes = kernel_sides(path, names)
        return dataclasses.replace(kernel, base=names, a=(*stack, *in_axes, None), b=(*stack, None, *out_axes))

    return map_paths(expand, params, axes, is_leaf=_is_adapted)


def _is_adapted(node: Any) -> bool:
    return isinstance(node, LoraKernel)
