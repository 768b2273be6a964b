"""The memory attention: features of a frame attend to the memories and pointers of an object.

The rotary positions of the original turn pairs of neighbouring channels. Here the projections of queries and keys have
the first channels of all pairs before the second ones, so that the rotation is that of `vl3_jax.kernels.rotary`.

Dimension names: B objects, N cells of the stride-16 map, S memory tokens, D width, m memory width.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32

from vl3_jax.kernels.backend import AttentionInputs
from vl3_jax.kernels.rotary import rotate
from vl3_jax.model.attention import attention
from vl3_jax.model.layers import LayerNorm, Linear, partitioned_param
from vl3_jax.model.linear import add_bias, linear
from vl3_jax.model.remat import scan_layers
from vl3_jax.model.rope import axial_rotary_table
from vl3_jax.parallel.rules import constrain_row_major, on_each_device, target_device
from vl3_jax.sam2.position_encoding import cell_coordinates
from vl3_jax.sam2.sam2_config import Sam2Config
from vl3_jax.sam2.sam2_layers import LAYER_NORM_EPS, Mlp, all_tokens


class MemoryTokens(NamedTuple):
    """What the features of a frame attend to: whole memory maps, then tokens of object pointers.

    Attributes:
      tokens: Tokens, [B, S, m].
      positions: Their positions, which are added to the keys, [B, S, m].
      valid: Tokens that may be attended to, [B, S] bool; the others may hold any finite values.
      maps: Number of memory maps, of N tokens each, at the front.
    """

    tokens: Float[Array, "B S m"]
    positions: Float[Array, "B S m"]
    valid: Bool[Array, "B S"]
    maps: int


class MemoryAttention(nn.Module):
    """Layers of self-attention and attention to the memory."""

    config: Sam2Config
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Float[Array, "B N D"], memory: MemoryTokens) -> Float[Array, "B N D"]:
        """Returns the features that the mask decoder reads, [B, N, D]; `features` have their position added."""
        config = self.config
        coordinates = jnp.asarray(cell_coordinates(config.grid))
        rotary = axial_rotary_table(coordinates, config.width // config.memory_heads, config.rope_theta)
        layers = scan_layers(MemoryLayer, "none", config.memory_layers, nn.broadcast)
        arrays = (memory.tokens + memory.positions, memory.tokens)
        layers = layers(config, memory.maps, self.param_dtype, name="layers")
        arrays = (array.astype(features.dtype) for array in arrays)
        features, _ = layers(features, rotary, *arrays, memory.valid)
        return LayerNorm(LAYER_NORM_EPS, "embed", self.param_dtype, name="norm")(features)


class MemoryLayer(nn.Module):
    """Pre-norm layer: self-attention, attention to the memory, MLP.

    Attributes:
      config: Configuration.
      maps: Number of memory maps, at the front of the memory.
      param_dtype: Dtype of the parameters.
    """

    config: Sam2Config
    maps: int
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        rotary: Float32[Array, "N head_dim"],
        memory_keys: Float[Array, "B S m"],
        memory: Float[Array, "B S m"],
        valid: Bool[Array, "B S"],
    ) -> tuple[jax.Array, None]:
        x = constrain_row_major(x, "batch", None, None)
        norm = functools.partial(LayerNorm, LAYER_NORM_EPS, "embed", self.param_dtype)
        attend = functools.partial(RotaryAttention, self.config, param_dtype=self.param_dtype)
        normed = norm(name="ln1")(x)
        x += attend(name="self_attn")(normed, normed, normed, rotary, 1, None)
        x += attend(name="memory_attn")(norm(name="ln2")(x), memory_keys, memory, rotary, self.maps, valid)
        widths = (self.config.width, self.config.memory_mlp, self.config.width)
        x += Mlp(widths, self.param_dtype, name="mlp")(norm(name="ln3")(x))
        return x, None


class ProjectedHeads(nn.Module):
    """Linear layer of heads that are rotated by the positions of their tokens, as `vl3_jax.kernels.rotary` does it.

    Attributes:
      shape: Number of heads and of their channels.
      param_dtype: Dtype of the parameters.
    """

    shape: tuple[int, int]
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L I"], rotary: Float32[Array, "N head_dim"] | None = None, maps: int = 1
    ) -> Float[Array, "B L H head_dim"]:
        """Projects tokens: `maps` times N of them are rotated by the table, the others of a row are not."""
        width, axes = x.shape[-1], ("embed", "heads", "head_dim")
        init, zeros = nn.initializers.normal(width**-0.5), nn.initializers.zeros
        kernel = partitioned_param(self, "kernel", init, (width, *self.shape), axes, self.param_dtype)
        bias = partitioned_param(self, "bias", zeros, self.shape, axes[1:], self.param_dtype)
        if target_device().platform == "tpu":
            from vl3_jax.kernels.tpu_projection import tpu_projection, tpu_projection_unsupported_reason

            if tpu_projection_unsupported_reason(x, kernel, rotary) is None:
                project = functools.partial(tpu_projection, maps=maps)
                arrays = (x, kernel, bias) if rotary is None else (x, kernel, bias, rotary)
                array_axes = ("batch", None, None), (None, "heads", None), ("heads", None), (None, None)
                return on_each_device(project, arrays, array_axes[: len(arrays)], ("batch", None, "heads", None))
        heads = add_bias(linear(x, kernel, axes), bias, axes[1:])
        if rotary is None:
            return heads
        rotated = rotate(heads[:, : maps * len(rotary)], jnp.tile(rotary, (maps, 1))[None])
        return jnp.concatenate([rotated, heads[:, maps * len(rotary) :]], axis=1)


class RotaryAttention(nn.Module):
    """Attention with rotary positions of queries and keys."""

    config: Sam2Config
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, q, k, v, rotary, maps: int, valid: Bool[Array, "B S"] | None) -> Float[Array, "B N D"]:
        """Attends; the rotary table, [N, head_dim], is that of the queries and of each of the `maps` of keys."""
        width, heads = self.config.width, self.config.memory_heads
        shape, axes = (heads, width // heads), ("heads", "head_dim")
        q = ProjectedHeads(shape, self.param_dtype, name="q")(q, rotary)
        k = ProjectedHeads(shape, self.param_dtype, name="k")(k, rotary, maps)
        v = ProjectedHeads(shape, self.param_dtype, name="v")(v)
        q_info, kv_info = all_tokens(q), all_tokens(k, valid)
        scale = (width // heads) ** -0.5
        out = attention(AttentionInputs(q, k, v, q_info, kv_info, causal=False, scale=scale))
        return Linear((*shape, width), (*axes, "embed"), num_in=2, param_dtype=self.param_dtype, name="out")(out)
