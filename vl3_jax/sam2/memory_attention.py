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
from vl3_jax.model.layers import LayerNorm, Linear
from vl3_jax.model.remat import scan_layers
from vl3_jax.model.rope import axial_rotary_table
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
        arrays = (memory.tokens + memory.positions, memory.tokens, memory.valid)
        layers = layers(config, memory.maps, self.param_dtype, name="layers")
        features, _ = layers(features, rotary, *(array.astype(features.dtype) for array in arrays[:2]), arrays[2])
        return LayerNorm(LAYER_NORM_EPS, "embed", self.param_dtype, name="norm")(features)


class MemoryLayer(nn.Module):
    """Pre-norm layer: self-attention, attention to the memory, MLP."""

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
        norm = functools.partial(LayerNorm, LAYER_NORM_EPS, "embed", self.param_dtype)
        attend = functools.partial(RotaryAttention, self.config, param_dtype=self.param_dtype)
        normed = norm(name="ln1")(x)
        x += attend(name="self_attn")(normed, normed, normed, rotary, rotary, None)
        key_rotary = jnp.tile(rotary, (self.maps, 1))
        x += attend(name="memory_attn")(norm(name="ln2")(x), memory_keys, memory, rotary, key_rotary, valid)
        widths = (self.config.width, self.config.memory_mlp, self.config.width)
        x += Mlp(widths, self.param_dtype, name="mlp")(norm(name="ln3")(x))
        return x, None


class RotaryAttention(nn.Module):
    """Attention with rotary positions of the queries and of the first keys."""

    config: Sam2Config
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, q, k, v, q_rotary, k_rotary, valid: Bool[Array, "B S"] | None) -> Float[Array, "B N D"]:
        """Attends; `k_rotary` [spatial keys, head_dim] rotates the keys at the front."""
        width, heads = self.config.width, self.config.memory_heads
        shape, axes = (heads, width // heads), ("heads", "head_dim")
        project = lambda x, name: Linear(  # noqa: E731
            (x.shape[-1], *shape), ("embed", *axes), param_dtype=self.param_dtype, name=name
        )(x)
        spatial = k_rotary.shape[0]
        q, k, v = rotate(project(q, "q"), q_rotary), project(k, "k"), project(v, "v")
        k = jnp.concatenate([rotate(k[:, :spatial], k_rotary), k[:, spatial:]], axis=1)
        q_info, kv_info = all_tokens(q), all_tokens(k, valid)
        scale = (width // heads) ** -0.5
        out = attention(AttentionInputs(q, k, v, q_info, kv_info, causal=False, scale=scale))
        return Linear((*shape, width), (*axes, "embed"), num_in=2, param_dtype=self.param_dtype, name="out")(out)
