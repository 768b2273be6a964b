"""Linen modules that the parts of SAM-2 share."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from vl3_jax.kernels.backend import AttentionInputs
from vl3_jax.kernels.dense import dense_attention
from vl3_jax.kernels.einsum import convolve, einsum
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.model.layers import LayerNorm, Linear, partitioned_param
from vl3_jax.parallel.rules import on_each_device, target_device

LAYER_NORM_EPS = 1e-5  # of the transformers; `MAP_NORM_EPS` of the layer normalisations between convolutions
MAP_NORM_EPS = 1e-6


class Conv(nn.Module):
    """Convolution of maps [B, H, W, I] with a bias.

    Attributes:
      shape: Shape of the kernel, (rows, columns, in, out).
      stride: Rows, and columns, from one output to the next.
      param_dtype: Dtype of the parameters.
    """

    shape: tuple[int, int, int, int]
    stride: int = 1
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init, axes = nn.initializers.normal(math.prod(self.shape[:3]) ** -0.5), (None, None, None, "vision_embed")
        kernel = partitioned_param(self, "kernel", init, self.shape, axes, self.param_dtype)
        bias = partitioned_param(self, "bias", nn.initializers.zeros, self.shape[3:], axes[3:], self.param_dtype)
        return convolve(x, kernel, self.stride) + bias.astype(x.dtype)


class DepthwiseConv(nn.Module):
    """Convolution of each channel of maps on its own, with a bias; the maps keep their size.

    Attributes:
      size: Rows, and columns, of the kernels; odd.
      param_dtype: Dtype of the parameters.
    """

    size: int
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        shape, axes = (self.size, self.size, 1, x.shape[-1]), (None, None, None, "vision_embed")
        init, zeros = nn.initializers.normal(1 / self.size), nn.initializers.zeros
        kernel = partitioned_param(self, "kernel", init, shape, axes, self.param_dtype)
        bias = partitioned_param(self, "bias", zeros, shape[3:], axes[3:], self.param_dtype)
        return self._convolve(x, kernel) + bias.astype(x.dtype)

    def _convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        if target_device().platform == "tpu":
            from vl3_jax.kernels.tpu_depthwise import tpu_depthwise, tpu_depthwise_unsupported_reason

            if tpu_depthwise_unsupported_reason(x, kernel) is None:
                batch = ("batch", None, None, None)
                return on_each_device(tpu_depthwise, (x, kernel), (batch, (None,) * 4), batch)
        return convolve(x, kernel, padding=self.size // 2, groups=x.shape[-1])


class DoublingConv(nn.Module):
    """Transposed convolution that makes 2 x 2 pixels of each: [B, H, W, I] -> [B, 2 H, 2 W, width]."""

    width: int
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, columns, channels = x.shape
        shape, axes = (channels, 2, 2, self.width), ("embed", None, None, None)
        kernel_init = nn.initializers.normal(channels**-0.5)
        kernel = partitioned_param(self, "kernel", kernel_init, shape, axes, self.param_dtype)
        bias = partitioned_param(self, "bias", nn.initializers.zeros, shape[3:], axes[3:], self.param_dtype)
        y = einsum("bhwi,iklo->bhkwlo", x, kernel.astype(x.dtype))
        return y.reshape(batch, 2 * height, 2 * columns, self.width) + bias.astype(x.dtype)


class Mlp(nn.Module):
    """Linear layers `fc1`, `fc2`, ... with ReLU between them.

    Attributes:
      widths: Channels of the input, of each hidden layer and of the output.
      param_dtype: Dtype of the parameters.
    """

    widths: tuple[int, ...]
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        last = len(self.widths) - 1
        for number, shape in enumerate(zip(self.widths, self.widths[1:], strict=False), 1):
            axes = ("embed", None) if number == last else ("embed", "mlp")
            x = Linear(shape, axes, param_dtype=self.param_dtype, name=f"fc{number}")(x)
            x = x if number == last else nn.relu(x)
        return x


class ProjectedAttention(nn.Module):
    """Attention of few tokens, or to few, with projections of queries, keys, values and output.

    Attributes:
      inner: Width of queries, keys and values.
      heads: Number of heads.
      param_dtype: Dtype of the parameters.
    """

    inner: int
    heads: int
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        q: Float[Array, "B L D"],
        k: Float[Array, "B S D"],
        v: Float[Array, "B S D"],
        valid: Bool[Array, "B S"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Attends from each query to the keys that are `valid`, to all where it is None."""
        width, head_dim = q.shape[-1], self.inner // self.heads
        project = lambda x, name: Linear(  # noqa: E731
            (width, self.heads, head_dim), ("embed", "heads", "head_dim"), param_dtype=self.param_dtype, name=name
        )(x)
        heads = (project(q, "q"), project(k, "k"), project(v, "v"))
        out = all_to_all_attention(*heads, valid)
        shape, axes = (self.heads, head_dim, width), ("heads", "head_dim", "embed")
        return Linear(shape, axes, num_in=2, param_dtype=self.param_dtype, name="out")(out)


def all_to_all_attention(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """Computes attention with all scores in memory, [B, L, H, D]; for few tokens on one side, or small windows.

    Args:
      q: Queries, [B, L, H, D].
      k: Keys, [B, S, H, D].
      v: Values, [B, S, H, D].
      valid: Keys to attend to, [B, S] bool; None for all.
    """
    q_info, kv_info = all_tokens(q), all_tokens(k, valid)
    return dense_attention(AttentionInputs(q, k, v, q_info, kv_info, causal=False, scale=q.shape[-1] ** -0.5))


def all_tokens(x: jax.Array, valid: jax.Array | None = None) -> SegmentInfo:
    """Returns the segments of rows [B, L, ...] of one segment each, without the tokens that are not `valid`."""
    segments = jnp.ones(x.shape[:2], jnp.int32) if valid is None else valid.astype(jnp.int32)
    return SegmentInfo(segments, segments)  # positions are not read where attention is not causal


def gelu(x: jax.Array) -> jax.Array:
    """Returns the exact GELU, computed in float32 by the error function, as PyTorch does it.

    `jax.nn.gelu` goes by its complement, which takes a TPU twice as long.
    """
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1 + jax.lax.erf(x32 * 2**-0.5))).astype(x.dtype)


def map_norm(name: str | None, param_dtype: DTypeLike) -> LayerNorm:
    """Returns the layer normalisation of each pixel's channels between two convolutions."""
    return LayerNorm(MAP_NORM_EPS, "vision_embed", param_dtype, name=name)
