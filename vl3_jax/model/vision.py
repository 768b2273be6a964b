"""The SigLIP-NaViT vision tower, the spatial merge after it, and the projector into the decoder's embedding space.

Dimension names: B text rows, R vision rows of N patches, T vision tokens, C tower width, H heads.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, UInt8

from vl3_jax.kernels.backend import AttentionInputs
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.model.attention import attention
from vl3_jax.model.config import ModelConfig, VisionConfig
from vl3_jax.model.layers import ACTIVATIONS, LayerNorm, Linear
from vl3_jax.model.remat import apply_layer, scan_layers
from vl3_jax.model.rope import axial_rotary_table
from vl3_jax.parallel.rules import constrain, constrain_row_major

ROW_AXES = ("batch", "vision_row")

Patches = UInt8[Array, "B R N P"] | Float[Array, "B R N P"]
Features = Float[Array, "B R N C"]
Rotary = Float32[Array, "B R N head_dim"]


class VisionTower(nn.Module):
    """Vision transformer over packed patches; attention stays within a frame.

    `serving` is whether the parameters are in the layout for serving, see `vl3_jax.model.serving_layout`.
    """

    config: VisionConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: str = "none"
    serving: bool = False

    @nn.compact
    def __call__(
        self, patches: Patches, patch_segment: Int32[Array, "B R N"], patch_hw: Int32[Array, "B R N 2"]
    ) -> Features:
        """Encodes packed rows of patches.

        Args:
          patches: Patches, [B, R, N, 588] uint8, each in the order channel, row, column; or already normalised floats.
          patch_segment: Frame of each patch, [B, R, N] int32, counted from 1; 0 = padding.
          patch_hw: Row and column of each patch in the frame's own grid, [B, R, N, 2] int32.

        Returns:
          Features after the final norm and before the merge, [B, R, N, C].
        """
        config = self.config
        with jax.named_scope("patch_embed"):
            pixels = self._normalise(patches).astype(self.dtype)
            shape, axes = (config.patch_dim, config.hidden_size), ("patch", "vision_embed")
            embed = Linear(shape, axes, param_dtype=self.param_dtype, name="patch_embed")
            x = constrain(embed(pixels), *ROW_AXES, None, None)
            self.sow("intermediates", "embedded", x)
        rotary = axial_rotary_table(patch_hw, config.head_dim, config.rope_theta)
        if self.serving:
            for index in range(config.num_layers):
                layer = VisionLayer(config, self.param_dtype, name=f"layers_{index}")
                x, _ = apply_layer(layer, x, rotary, patch_segment)
        else:
            layers = scan_layers(VisionLayer, self.remat, config.num_layers, nn.broadcast)
            x, _ = layers(config, self.param_dtype, name="layers")(x, rotary, patch_segment)
        return LayerNorm(config.layer_norm_eps, "vision_embed", self.param_dtype, name="post_ln")(x)

    def _normalise(self, patches: Patches) -> Float[Array, "B R N P"]:
        if patches.dtype != jnp.uint8:
            return patches
        area = self.config.patch_size**2
        mean, std = (jnp.repeat(jnp.array(x), area) for x in (self.config.image_mean, self.config.image_std))
        return (patches.astype(jnp.float32) * (1 / 255) - mean) / std


class VisionLayer(nn.Module):
    """Pre-norm transformer block with biases in every linear layer, as in SigLIP."""

    config: VisionConfig
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Features, rotary: Rotary, segment: Int32[Array, "B R N"]) -> tuple[Features, None]:
        norm = functools.partial(LayerNorm, self.config.layer_norm_eps, "vision_embed", self.param_dtype)
        attn = VisionAttention(self.config, self.param_dtype, name="attn")
        x += attn(norm(name="ln1")(x), rotary, segment)
        mlp = VisionMLP(self.config, self.param_dtype, name="mlp")
        x += mlp(norm(name="ln2")(x))
        x = constrain_row_major(x, *ROW_AXES, None, None)
        self.sow("intermediates", "out", x)
        return x, None


class VisionAttention(nn.Module):
    """Multi-head attention with 2D rotary positions, within each frame."""

    config: VisionConfig
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Features, rotary: Rotary, segment: Int32[Array, "B R N"]) -> Features:
        width, heads, head_dim = self.config.hidden_size, self.config.num_heads, self.config.head_dim
        shape, axes = (width, heads, head_dim), ("vision_embed", "vision_heads", "head_dim")
        q, k, v = (Linear(shape, axes, param_dtype=self.param_dtype, name=name)(x) for name in "qkv")
        info = SegmentInfo(segment, segment)  # positions are not read where attention is not causal
        with jax.named_scope("attention"):
            inputs = AttentionInputs(q, k, v, info, info, causal=False, scale=head_dim**-0.5, rotary=rotary)
            out = attention(inputs, axes=ROW_AXES)
        shape, axes = (heads, head_dim, width), ("vision_heads", "head_dim", "vision_embed")
        return Linear(shape, axes, num_in=2, param_dtype=self.param_dtype, name="out")(out)


class VisionMLP(nn.Module):
    """Two linear layers with the tower's activation between them."""

    config: VisionConfig
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Features) -> Features:
        width, inner = self.config.hidden_size, self.config.intermediate_size
        hidden = Linear((width, inner), ("vision_embed", "vision_mlp"), param_dtype=self.param_dtype, name="fc1")(x)
        hidden = constrain_row_major(ACTIVATIONS[self.config.hidden_act](hidden), *ROW_AXES, None, None)
        return Linear((inner, width), ("vision_mlp", "vision_embed"), param_dtype=self.param_dtype, name="fc2")(hidden)


def merge_patches(features: Features, token_patches: Int32[Array, "B T 4"]) -> Float[Array, "B T C"]:
    """Computes each vision token as the mean of its patches.

    Pruned tokens are not part of `token_patches` and cost nothing.

    Args:
      features: Features of the patches, [B, R, N, C].
      token_patches: Patches of each token, [B, T, 4] int32 indices into R * N; -1 = none.

    Returns:
      Vision tokens, [B, T, C]; zeros for a token without patches.
    """
    flat = features.reshape(features.shape[0], -1, features.shape[-1])
    gather = jax.vmap(lambda row, index: jnp.take(row, index, axis=0, mode="clip"))
    total = 0.0
    for corner in range(token_patches.shape[-1]):
        index = token_patches[..., corner]
        total += jnp.where(index[..., None] >= 0, gather(flat, index), 0).astype(jnp.float32)
    count = jnp.sum(token_patches >= 0, axis=-1, keepdims=True)
    return (total / jnp.maximum(count, 1)).astype(features.dtype)


class Projector(nn.Module):
    """Two-layer MLP (`mlp2x_gelu`) from merged tower features to the decoder's embedding space."""

    config: ModelConfig
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T D"]:
        width, out = self.config.vision.hidden_size, self.config.text.hidden_size
        linear = functools.partial(Linear, uniform_init=True, param_dtype=self.param_dtype)
        hidden = ACTIVATIONS[self.config.projector_act](linear((width, out), ("vision_embed", "mlp"), name="fc1")(x))
        features = linear((out, out), ("embed", "mlp"), name="fc2")(hidden)
        # Without this constraint the compiler may split the width over `tensor`, and on a mesh of data, fsdp and tensor
        # compute a wrong backward product (jax 0.10.2: its rows come in the order of another mesh axis).
        return constrain(features, "batch", None, None)
