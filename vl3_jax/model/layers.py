"""The small Linen modules that tower, projector and decoder share."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.initializers import Initializer
from jax.typing import DTypeLike

from vl3_jax.model.linear import linear

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "silu": nn.silu,
}

EMBEDDING_INIT = nn.initializers.normal(0.02)


def fan_in_uniform(fan_in: int) -> Initializer:
    """Uniform in +-1/sqrt(fan_in): how a fresh projector's weights and biases start."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class Linear(nn.Module):
    """y = x . kernel + bias over the last `num_in` dimensions of x.

    Attributes:
      shape: (*in_shape, *out_shape) of the kernel; the bias has out_shape.
      axes: logical axis names of the kernel's dimensions.
      num_in: how many of them are contracted.
      kernel_init: by default normal with variance 1 / fan-in, which serves narrow models as well as wide ones.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    num_in: int = 1
    use_bias: bool = True
    kernel_init: Initializer | None = None
    bias_init: Initializer = nn.initializers.zeros
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        fan_in = math.prod(self.shape[: self.num_in])
        kernel_init = self.kernel_init or nn.initializers.normal(fan_in**-0.5)
        kernel_init = nn.with_logical_partitioning(kernel_init, self.axes)
        y = linear(x, self.param("kernel", kernel_init, self.shape, self.param_dtype), self.num_in)
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(self.bias_init, self.axes[self.num_in :])
            y += self.param("bias", bias_init, self.shape[self.num_in :], self.param_dtype).astype(y.dtype)
        return y


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension, computed in float32."""

    eps: float
    axis: str
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = _vector(self, "scale", nn.initializers.ones, x.shape[-1], self.axis, self.param_dtype)
        bias = _vector(self, "bias", nn.initializers.zeros, x.shape[-1], self.axis, self.param_dtype)
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + self.eps)
        return (normal * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation: float32 inside, cast back, then times the weight."""

    eps: float
    axis: str
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = _vector(self, "scale", nn.initializers.ones, x.shape[-1], self.axis, self.param_dtype)
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + self.eps)
        return normal.astype(x.dtype) * scale.astype(x.dtype)


def _vector(module: nn.Module, name: str, init: Initializer, size: int, axis: str, dtype: DTypeLike) -> jax.Array:
    return module.param(name, nn.with_logical_partitioning(init, (axis,)), (size,), dtype)
