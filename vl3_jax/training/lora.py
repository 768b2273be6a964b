"""Low-rank adapters (LoRA, arXiv 2106.09685) on the kernels that path patterns name.

The official trainer's defaults are rank 64, alpha 16 and a dropout of 0.05 on the adapters' input. There is no dropout
here: a step needs no random numbers.
"""

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
from vl3_jax.model.quantize import QuantizedKernel
from vl3_jax.training.groups import leaf_path

RANK = 64
ALPHA = 16.0
# Every linear layer of the decoder, without the output head.
LLM: tuple[str, ...] = (r"llm/layers/attn/(q|k|v|out)/kernel", r"llm/layers/mlp/(gate|up|down)/kernel")
# What the official trainer adapts of the tower, where PEFT finds the decoder's module names.
TOWER: tuple[str, ...] = (r"vision/layers/attn/(q|k|v)/kernel",)


def add_adapters(
    params: Any, key: jax.Array, patterns: Sequence[str] = LLM, rank: int = RANK, alpha: float = ALPHA
) -> Any:
    """`params` with a `LoraKernel` around each kernel whose path a pattern matches wholly; the model is unchanged.

    As in PEFT, `a` starts uniform in +-1/sqrt(fan in) and `b` at zero; both are float32.

    Args:
      params: tree of parameters, or of their shapes under `jax.eval_shape`; kernels may be quantised.
      key: where `a` is drawn from, for each path apart.
      patterns: regular expressions over paths such as "llm/layers/attn/q/kernel".
      rank, alpha: the adapters' part is alpha / rank * a b.

    Raises:
      InputError: a pattern that matches no kernel, or a rank below 1.
    """
    if rank < 1:
        raise InputError(f"the rank of adapters is {rank}; give at least 1")
    unused = set(patterns)

    def adapt(path: Sequence[Any], kernel: Any) -> Any:
        path = leaf_path(path)
        matching = [pattern for pattern in patterns if path.endswith("/kernel") and re.fullmatch(pattern, path)]
        unused.difference_update(matching)
        if not matching:
            return kernel
        stack, in_shape, out_shape = _shapes(path, kernel.shape)
        bound = math.prod(in_shape) ** -0.5
        here = jax.random.fold_in(key, zlib.crc32(path.encode()))
        a = jax.random.uniform(here, (*stack, *in_shape, rank), jnp.float32, -bound, bound)
        return LoraKernel(kernel, a, jnp.zeros((*stack, rank, *out_shape), jnp.float32), alpha / rank)

    adapted = jax.tree_util.tree_map_with_path(adapt, params, is_leaf=_is_kernel)
    if unused:
        raise InputError(f"adapters: no kernel is called {min(unused)!r}; give paths such as llm/layers/attn/q/kernel")
    return adapted


def merge_adapters(params: Any) -> Any:
    """Plain parameters: base + scale * a b, summed in float32, in the base's type (float32 for a quantised one)."""

    def merge(kernel: Any) -> Any:
        if not isinstance(kernel, LoraKernel):
            return kernel
        base = kernel.base
        if isinstance(base, QuantizedKernel):
            base = base.values * base.scale
        return (base.astype(jnp.float32) + adapter_product(kernel)).astype(base.dtype)

    return jax.tree.map(merge, params, is_leaf=_is_adapted)


def remove_adapters(params: Any) -> Any:
    """The parameters without their adapters."""
    return jax.tree.map(lambda x: x.base if isinstance(x, LoraKernel) else x, params, is_leaf=_is_adapted)


def adapter_product(kernel: LoraKernel) -> jax.Array:
    """The adapter's part, scale * a b: float32, in the kernel's shape."""
    a, b, shape = kernel.a.astype(jnp.float32), kernel.b.astype(jnp.float32), kernel.shape
    stack, rank = shape[: a.ndim + b.ndim - 2 - len(shape)], a.shape[-1]
    product = einsum("...ir,...ro->...io", a.reshape(*stack, -1, rank), b.reshape(*stack, rank, -1))
    return kernel.scale * product.reshape(shape)


def adapter_axes(params: Any, axes: Any) -> Any:
    """The logical axes of `params`, from those of the plain tree: an adapter's are its kernel's, its rank has none.

    Args:
      params: tree of arrays or shapes, with adapters and quantised kernels or without.
      axes: from `vl3_jax.model.param_axes`.
    """

    def expand(path: Sequence[Any], kernel: Any, names: tuple[str, ...]) -> Any:
        if isinstance(kernel, QuantizedKernel):
            return QuantizedKernel(names, names)
        if not isinstance(kernel, LoraKernel):
            return names
        stack, in_axes, out_axes = _shapes(leaf_path(path), names)
        base = expand(path, kernel.base, names)
        return kernel.replace(base=base, a=(*stack, *in_axes, None), b=(*stack, None, *out_axes))

    return jax.tree_util.tree_map_with_path(expand, params, axes, is_leaf=_is_kernel)


def _is_adapted(node: Any) -> bool:
    return isinstance(node, LoraKernel)


def _is_kernel(node: Any) -> bool:
    return isinstance(node, LoraKernel | QuantizedKernel)


def _shapes(path: str, dimensions: tuple) -> tuple[tuple, tuple, tuple]:
    """A kernel's dimensions (sizes or names): stacked layers, inputs, outputs."""
    *modules, module, _ = path.split("/")
    stacked = int("layers" in modules)
    inputs = stacked + (2 if module == "out" else 1)  # the output projection of attention takes heads and head_dim
    return dimensions[:stacked], dimensions[stacked:inputs], dimensions[inputs:]
