"""The memory encoder: the features of a frame and the mask of an object as a small map."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vl3_jax.model.layers import Linear, partitioned_param
from vl3_jax.sam2.packed_maps import HalvingConv, PackedNorm, packed
from vl3_jax.sam2.sam2_config import STRIDE, Sam2Config
from vl3_jax.sam2.sam2_layers import MAP_NORM_EPS, DepthwiseConv, gelu, map_norm


class MemoryEncoder(nn.Module):
    """Encodes what a frame shows of an object."""

    config: Sam2Config
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "B G G D"], masks: Float[Array, "B size size"]
    ) -> Float[Array, "B G G m"]:
        """Encodes masks.

        Args:
          features: Stride-16 features of the frame without memory, [B or 1, G, G, D].
          masks: Masks at the size of the input image, scaled for the encoder, [B, size, size].

        Returns:
          Memories, [B, G, G, memory_width].
        """
        config, dtype = self.config, self.param_dtype
        x, side, channels = packed(masks[..., None].astype(features.dtype), config.grid), STRIDE, 1
        for number in range(1, STRIDE.bit_length()):  # each convolution halves the map and quadruples the channels
            x = HalvingConv((channels, 4 * channels), side, dtype, name=f"conv{number}")(x)
            side, channels = side // 2, 4 * channels
            x = gelu(PackedNorm(channels, MAP_NORM_EPS, dtype, name=f"norm{number}")(x))
        linear = lambda width, out, name: Linear((width, out), ("vision_embed", None), param_dtype=dtype, name=name)  # noqa: E731
        x = linear(channels, config.width, "masks")(x) + linear(config.width, config.width, "features")(features)
        for number in range(config.fuser_layers):
            x = FuserBlock(config, dtype, name=f"fuser{number}")(x)
        return linear(config.width, config.memory_width, "out")(x)


class FuserBlock(nn.Module):
    """ConvNeXt block: depthwise convolution, then an MLP of each pixel."""

    config: Sam2Config
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B G G D"]) -> Float[Array, "B G G D"]:
        width, inner = self.config.width, self.config.fuser_mlp
        conv = DepthwiseConv(self.config.fuser_kernel, self.param_dtype, name="conv")
        hidden = map_norm("norm", self.param_dtype)(conv(x))
        axes = ("vision_embed", "vision_mlp")
        hidden = Linear((width, inner), axes, param_dtype=self.param_dtype, name="fc1")(hidden)
        hidden = gelu(hidden)
        hidden = Linear((inner, width), axes[::-1], param_dtype=self.param_dtype, name="fc2")(hidden)
        init = nn.initializers.constant(1e-6)
        scale = partitioned_param(self, "scale", init, (width,), ("vision_embed",), self.param_dtype)
        return x + scale.astype(x.dtype) * hidden
