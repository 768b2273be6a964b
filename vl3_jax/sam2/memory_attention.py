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
      map_positions: What is added to the keys of each memory map, [maps, N, m].
      other_positions: What is added to the other keys, [B, S - maps * N, m].
      valid: Tokens that may be attended to, [B, S] bool; the others may hold any finite values.
    """

    tokens: Float[Array, "B S m"]
    map_positions: Float[Array, "maps N m"]
    other_positions: Float[Array, "B O m"]
    valid: Bool[Array, "B S"]


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
        layers = layers(config, self.param_dtype, name="layers")
        arrays = {name: x.astype(features.dtype) for name, x in memory._asdict().items() if name != "valid"}
        # Without the barrier, each layer would compute the positions of its keys.
        memory = memory._replace(**jax.lax.optimization_barrier(arrays))
        features, _ = layers(features, rotary, memory)
        return LayerNorm(LAYER_NORM_EPS, "embed", self.param_dtype, name="norm")(features)


class MemoryLayer(nn.Module):
    """Pre-norm layer: self-attention, attention to the memory, MLP."""

    config: Sam2Config
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        rotary: Float32[Array, "N head_dim"],
        memory: MemoryTokens,
    ) -> tuple[jax.Array, None]:
        x = constrain_row_major(x, "batch", None, None)
        norm = functools.partial(LayerNorm, LAYER_NORM_EPS, "embed", self.param_dtype)
        attend = functools.partial(RotaryAttention, self.config, param_dtype=self.param_dtype)
        normed = norm(name="ln1")(x)
        x += attend(name="self_attn")(normed, normed, rotary)
        positions = memory.map_positions.reshape(-1, memory.tokens.shape[-1]), memory.other_positions
        x += attend(name="memory_attn")(norm(name="ln2")(x), memory.tokens, rotary, positions, memory.valid)
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
        self,
        x: Float[Array, "B L I"],
        rotary: Float32[Array, "N head_dim"] | None = None,
        positions: tuple[Float[Array, "M I"], Float[Array, "B O I"]] | None = None,
    ) -> Float[Array, "B L H head_dim"]:
        """Projects tokens.

        Args:
          x: Tokens of a row: maps of N tokens, which are rotated, then others.
          rotary: Rotary table of a map; None rotates nothing.
          positions: What is added to the tokens of all maps, alike in all rows, and to the others; without it, a row is
            one map.
        """
        width, axes = x.shape[-1], ("embed", "heads", "head_dim")
        init, zeros = nn.initializers.normal(width**-0.5), nn.initializers.zeros
        kernel = partitioned_param(self, "kernel", init, (width, *self.shape), axes, self.param_dtype)
        bias = partitioned_param(self, "bias", zeros, self.shape, axes[1:], self.param_dtype)
        if target_device().platform == "tpu":
            from vl3_jax.kernels.tpu_projection import tpu_projection, tpu_projection_unsupported_reason

            if tpu_projection_unsupported_reason(x, kernel, rotary) is None:
                arrays = (x, kernel, bias, *(() if rotary is None else (rotary,)), *(positions or ()))
                array_axes = [("batch", None, None), (None, "heads", None), ("heads", None), (None, None)]
                array_axes += [(None, None), ("batch", None, None)]
                return on_each_device(tpu_projection, arrays, array_axes[: len(arrays)], ("batch", None, "heads", None))
        if positions is not None:
            in_maps = jnp.broadcast_to(positions[0], (len(x), *positions[0].shape))
            x += jnp.concatenate([in_maps, positions[1]], axis=1)
        heads = add_bias(linear(x, kernel, axes), bias, axes[1:])
        if rotary is None:
            return heads
        count = len(rotary) if positions is None else len(positions[0])
        rotated = rotate(heads[:, :count], jnp.tile(rotary, (count // len(rotary), 1))[None])
        return jnp.concatenate([rotated, heads[:, count:]], axis=1)


class RotaryAttention(nn.Module):
    """Attention with rotary positions of queries and keys."""

    config: Sam2Config
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        tokens: Float[Array, "B S I"],
        rotary: Float32[Array, "N head_dim"],
        positions: tuple[jax.Array, jax.Array] | None = None,
        valid: Bool[Array, "B S"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Attends from `x` to tokens, with the positions of keys, see `ProjectedHeads`; to the valid ones, or all."""
        width, heads = self.config.width, self.config.memory_heads
        shape, axes = (heads, width // heads), ("heads", "head_dim")
        q = ProjectedHeads(shape, self.param_dtype, name="q")(x, rotary)
        k = ProjectedHeads(shape, self.param_dtype, name="k")(tokens, rotary, positions)
        v = ProjectedHeads(shape, self.param_dtype, name="v")(tokens)
        q_info, kv_info = all_tokens(q), all_tokens(k, valid)
        scale = (width // heads) ** -0.5
        out = attention(AttentionInputs(q, k, v, q_info, kv_info, causal=False, scale=scale))
        return Linear((*shape, width), (*axes, "embed"), num_in=2, param_dtype=self.param_dtype, name="out")(out)
