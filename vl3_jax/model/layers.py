"""Linen modules that the tower, the projector and the decoder share."""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jax.typing import DTypeLike

from vl3_jax.model.config import HIDDEN_ACTS
from vl3_jax.model.linear import add_bias, linear
from vl3_jax.parallel.rules import Axis

_gelu_tanh, _gelu = (functools.partial(nn.gelu, approximate=approximate) for approximate in (True, False))
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = dict(
    zip(HIDDEN_ACTS, (_gelu_tanh, _gelu, nn.silu), strict=True)
)


def partitioned_param(
    module: nn.Module, name: str, init: Initializer, shape: Sequence[int], axes: Sequence[Axis], dtype: DTypeLike
) -> jax.Array:
    """Returns a parameter of a module, created with the logical axis names of its dimensions.

    What stands in the place of an array, such as a quantised kernel, is returned as it is.
    """
    if module.has_variable("params", name) and hasattr(stored := module.get_variable("params", name), "values"):
        return stored  # pyright: ignore[reportReturnType]  # used like an array
    boxed = nn.with_logical_partitioning(init, tuple(axes))  # pyright: ignore[reportArgumentType]  # names of our own
    return module.param(name, boxed, tuple(shape), dtype, unbox=True)


class Linear(nn.Module):
    """Linear layer over the last `num_in` dimensions of its input.

    Attributes:
      shape: Shape of the kernel, (*in_shape, *out_shape); the bias has shape out_shape.
      axes: Logical axis names of the kernel's dimensions.
      num_in: Number of input dimensions, which are contracted.
      transposed: Whether the kernel is a matrix (*out_shape, *in_shape) instead.
      use_bias: Whether a bias is added.
      uniform_init: Whether kernel and bias are created uniform in +-1/sqrt(fan-in), as the official projector is.
        Otherwise the bias is zero and the kernel normal with variance 1 / fan-in, which suits narrow models as well as
        wide ones.
      param_dtype: Dtype of the parameters.
    """

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    num_in: int = 1
    transposed: bool = False
    use_bias: bool = True
    uniform_init: bool = False
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, axes = (self.shape[::-1], self.axes[::-1]) if self.transposed else (self.shape, self.axes)
        bound = math.prod(shape[: self.num_in]) ** -0.5
        kernel_init, bias_init = nn.initializers.normal(bound), nn.initializers.zeros
        if self.uniform_init:
            kernel_init = bias_init = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
        kernel = partitioned_param(self, "kernel", kernel_init, self.shape, self.axes, self.param_dtype)
        y = linear(x, kernel, self.axes, self.num_in, self.transposed)
        if self.use_bias:
            shape, axes = shape[self.num_in :], axes[self.num_in :]
            y = add_bias(y, partitioned_param(self, "bias", bias_init, shape, axes, self.param_dtype), axes)
        return y


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension, computed in float32."""

    eps: float
    axis: str | None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, axes = x.shape[-1:], (self.axis,)
        scale = partitioned_param(self, "scale", nn.initializers.ones, shape, axes, self.param_dtype)
        bias = partitioned_param(self, "bias", nn.initializers.zeros, shape, axes, self.param_dtype)
        x32 = x.astype(jnp.float32)
        mean = x32.mean(-1, keepdims=True)
        variance = jnp.maximum(jnp.mean(x32**2, -1, keepdims=True) - mean**2, 0)  # x is read once
        normalised = (x32 - mean) * jax.lax.rsqrt(variance + self.eps)
        return (normalised * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32 and cast back before it is scaled."""

    eps: float
    axis: str
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = partitioned_param(self, "scale", nn.initializers.ones, x.shape[-1:], (self.axis,), self.param_dtype)
        x32 = x.astype(jnp.float32)
        normalised = x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + self.eps)
        return normalised.astype(x.dtype) * scale.astype(x.dtype)
