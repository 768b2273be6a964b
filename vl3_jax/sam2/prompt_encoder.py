"""The prompt encoder: points, boxes, masks and vectors of other models, as tokens and as a map.

Dimension names: B objects, P points, E extra vectors, D width, G rows and columns of the stride-16 map.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from vl3_jax.model.layers import partitioned_param
from vl3_jax.processing.object_prompts import NOT_A_POINT, PADDING
from vl3_jax.sam2.position_encoding import as_array, cell_centres, fourier_features
from vl3_jax.sam2.sam2_config import POINT_KINDS, Sam2Config
from vl3_jax.sam2.sam2_layers import Conv, gelu, map_norm


class PromptTokens(NamedTuple):
    """Prompts as tokens of the mask decoder.

    Attributes:
      tokens: Tokens, [B, P + E, D].
      valid: Tokens that are not padding, [B, P + E] bool.
    """

    tokens: Float[Array, "B T D"]
    valid: Bool[Array, "B T"]


class PromptEncoder(nn.Module):
    """Embeds prompts of any kind."""

    config: Sam2Config
    param_dtype: DTypeLike = jnp.float32

    def setup(self):
        config, normal = self.config, nn.initializers.normal(0.02)
        parameter = lambda name, init, shape: partitioned_param(  # noqa: E731
            self, name, init, shape, (*[None] * (len(shape) - 1), "embed"), self.param_dtype
        )
        self.frequencies = parameter("frequencies", nn.initializers.normal(1.0), (2, config.width // 2))
        self.point_kinds = parameter("point_kinds", normal, (POINT_KINDS, config.width))
        self.not_a_point = parameter("not_a_point", normal, (config.width,))
        self.no_mask = parameter("no_mask", normal, (config.width,))
        inner, dtype = config.prompt_mask_width, self.param_dtype
        self.mask_conv1 = Conv((2, 2, 1, inner // 4), stride=2, param_dtype=dtype)
        self.mask_norm1 = map_norm(None, dtype)
        self.mask_conv2 = Conv((2, 2, inner // 4, inner), stride=2, param_dtype=dtype)
        self.mask_norm2 = map_norm(None, dtype)
        self.mask_conv3 = Conv((1, 1, inner, config.width), param_dtype=dtype)

    def points(
        self,
        coordinates: Float[Array, "B P 2"],
        labels: Int32[Array, "B P"],
        vectors: Float[Array, "B E D"] | None = None,
        vectors_valid: Bool[Array, "B E"] | None = None,
    ) -> PromptTokens:
        """Embeds points and the corners of boxes, and appends vectors of other models.

        Args:
          coordinates: Column and row of each point in pixels of the input image, [B, P, 2]; a whole number is the
            pixel's upper left corner.
          labels: What each point is, [B, P] int32; see `vl3_jax.processing.object_prompts`.
          vectors: Further tokens, such as those of `[SEG]`, [B, E, D].
          vectors_valid: Vectors that are not padding, [B, E] bool; None for all.

        Returns:
          A token for each point and vector.
        """
        shares = (coordinates + 0.5) / self.config.image_size
        encoded = fourier_features(shares.astype(jnp.float32), self.frequencies.astype(jnp.float32))
        encoded += self.point_kinds[jnp.clip(labels, 0, POINT_KINDS - 1)]
        tokens = jnp.where((labels == NOT_A_POINT)[..., None], self.not_a_point, encoded)
        valid = labels != PADDING
        if vectors is not None:
            vectors_valid = jnp.ones(vectors.shape[:2], bool) if vectors_valid is None else vectors_valid
            tokens = jnp.concatenate([tokens, vectors.astype(tokens.dtype)], axis=1)
            valid = jnp.concatenate([valid, vectors_valid], axis=1)
        return PromptTokens(tokens, valid)

    def mask(self, mask: Float[Array, "B 4G 4G"]) -> Float[Array, "B G G D"]:
        """Embeds low-resolution masks of logits."""
        x = gelu(self.mask_norm1(self.mask_conv1(mask[..., None])))
        return self.mask_conv3(gelu(self.mask_norm2(self.mask_conv2(x))))

    def positions(self) -> Float[Array, "G G D"]:
        """Returns the encoding of each cell of the stride-16 map."""
        centres = as_array(cell_centres(self.config.grid), jnp.float32)
        return fourier_features(centres, self.frequencies.astype(jnp.float32))
