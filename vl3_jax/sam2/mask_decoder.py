"""The mask decoder: a two-way transformer between prompts and image, and the masks that its tokens draw.

Dimension names: B objects, T prompt tokens, D width, G rows and columns of the stride-16 map, M mask tokens.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from vl3_jax.kernels.einsum import einsum
from vl3_jax.model.layers import LayerNorm, Linear, partitioned_param
from vl3_jax.sam2.prompt_encoder import PromptTokens
from vl3_jax.sam2.sam2_config import MASK_TOKENS, Sam2Config
from vl3_jax.sam2.sam2_layers import LAYER_NORM_EPS, DoublingConv, Mlp, ProjectedAttention, gelu, map_norm

ABSENT_LOGIT = -1024.0


class DecodedMasks(NamedTuple):
    """Everything that the decoder predicts of one object.

    Attributes:
      masks: Low-resolution logits of the single mask, then of the three of an ambiguous prompt, [B, M, 4G, 4G].
      scores: Predicted IoU of each mask, [B, M].
      tokens: Mask tokens after the transformer, [B, M, D].
      presence: Logit of the object being in the image, [B].
    """

    masks: Float[Array, "B M 4G 4G"]
    scores: Float[Array, "B M"]
    tokens: Float[Array, "B M D"]
    presence: Float[Array, " B"]


class MaskDecoder(nn.Module):
    """Predicts masks from features of an image and embedded prompts."""

    config: Sam2Config
    param_dtype: DTypeLike = jnp.float32

    def setup(self):
        config, dtype, width = self.config, self.param_dtype, self.config.width
        token = lambda name, count: partitioned_param(  # noqa: E731
            self, name, nn.initializers.normal(0.02), (count, width), (None, "embed"), dtype
        )
        self.presence_token, self.iou_token = token("presence_token", 1), token("iou_token", 1)
        self.mask_tokens = token("mask_tokens", MASK_TOKENS)
        self.blocks = [TwoWayBlock(config, first=i == 0, param_dtype=dtype) for i in range(config.decoder_layers)]
        inner = width // config.decoder_downsample
        self.final_attn = ProjectedAttention(inner, config.decoder_heads, dtype)
        self.final_norm = LayerNorm(LAYER_NORM_EPS, "embed", dtype)
        self.fine = Linear((width, width // 8), ("embed", None), param_dtype=dtype)
        self.middle = Linear((width, width // 4), ("embed", None), param_dtype=dtype)
        self.upscale1, self.upscale2 = DoublingConv(width // 4, dtype), DoublingConv(width // 8, dtype)
        self.upscale_norm = map_norm(None, dtype)
        hyper = nn.vmap(
            Mlp,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=1,
            out_axes=1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        self.hyper = hyper((width, width, width, width // 8), dtype)
        hidden = (config.iou_width,) * (config.iou_layers - 1)
        self.iou = Mlp((width, *hidden, MASK_TOKENS), dtype)
        self.presence = Mlp((width, width, width, 1), dtype)

    def high_resolution(self, stride4: jax.Array, stride8: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Projects features of strides 4 and 8 to the widths at which they join the masks."""
        return self.fine(stride4), self.middle(stride8)

    def __call__(
        self,
        features: Float[Array, "B G G D"],
        fine: Float[Array, "B 4G 4G d"],
        middle: Float[Array, "B 2G 2G d"],
        prompts: PromptTokens,
        dense: Float[Array, "B G G D"] | Float[Array, " D"],
        positions: Float[Array, "G G D"],
    ) -> DecodedMasks:
        """Predicts all masks of each object.

        Args:
          features: Stride-16 features, with memory or with the embedding of its absence, [B or 1, G, G, D].
          fine: Stride-4 features of `high_resolution`, [B or 1, 4G, 4G, D / 8].
          middle: Stride-8 features of `high_resolution`, [B or 1, 2G, 2G, D / 4].
          prompts: Tokens of the prompts.
          dense: Embedded mask prompts, or the embedding of none.
          positions: Encoding of the cells.
        """
        rows, dtype = prompts.tokens.shape[0], features.dtype
        own = jnp.concatenate([self.presence_token, self.iou_token, self.mask_tokens]).astype(dtype)
        own = jnp.broadcast_to(own, (rows, *own.shape))
        tokens = jnp.concatenate([own, prompts.tokens.astype(dtype)], axis=1)
        valid = jnp.concatenate([jnp.ones(own.shape[:2], bool), prompts.valid], axis=1)
        keys = jnp.broadcast_to(features + dense.astype(dtype), (rows, *features.shape[1:]))
        grid, keys = keys.shape[:3], keys.reshape(rows, -1, keys.shape[-1])
        positions = positions.astype(dtype).reshape(-1, keys.shape[-1])
        queries = tokens
        for block in self.blocks:
            queries, keys = block(queries, keys, tokens, positions, valid)
        queries += self.final_attn(queries + tokens, keys + positions, keys)
        queries = self.final_norm(queries)
        mask_tokens = queries[:, 2 : 2 + MASK_TOKENS]
        masks = self._draw(keys.reshape(*grid, -1), fine, middle, mask_tokens)
        scores = jax.nn.sigmoid(self.iou(queries[:, 1]).astype(jnp.float32))
        return DecodedMasks(masks, scores, mask_tokens, self.presence(queries[:, 0])[:, 0].astype(jnp.float32))

    def _draw(self, keys: jax.Array, fine: jax.Array, middle: jax.Array, mask_tokens: jax.Array) -> jax.Array:
        x = gelu(self.upscale_norm(self.upscale1(keys) + middle))
        x = gelu(self.upscale2(x) + fine)
        return einsum("bmd,bhwd->bmhw", self.hyper(mask_tokens), x, out_dtype=jnp.float32)


class TwoWayBlock(nn.Module):
    """Tokens attend to each other and to the image, and the image to the tokens.

    In the first block the self-attention replaces the tokens and sees no positions.
    """

    config: Sam2Config
    first: bool
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, queries, keys, tokens, positions, valid: Bool[Array, "B T"]) -> tuple[jax.Array, jax.Array]:
        config, width = self.config, self.config.width
        norm = functools.partial(LayerNorm, LAYER_NORM_EPS, "embed", self.param_dtype)
        attend = functools.partial(ProjectedAttention, heads=config.decoder_heads, param_dtype=self.param_dtype)
        inner = width // config.decoder_downsample
        self_attn = attend(width, name="self_attn")
        if self.first:
            queries = self_attn(queries, queries, queries, valid)
        else:
            placed = queries + tokens
            queries += self_attn(placed, placed, queries, valid)
        queries = norm(name="ln1")(queries)
        queries += attend(inner, name="to_image")(queries + tokens, keys + positions, keys)
        queries = norm(name="ln2")(queries)
        queries += Mlp((width, config.decoder_mlp, width), self.param_dtype, name="mlp")(queries)
        queries = norm(name="ln3")(queries)
        keys += attend(inner, name="to_tokens")(keys + positions, queries + tokens, queries, valid)
        return queries, norm(name="ln4")(keys)


class ChosenMask(NamedTuple):
    """The mask of each object.

    Attributes:
      mask: Low-resolution logits, [B, 4G, 4G].
      score: Predicted IoU, [B].
      token: Token that the object pointer is made of, [B, D].
    """

    mask: Float[Array, "B 4G 4G"]
    score: Float[Array, " B"]
    token: Float[Array, "B D"]


def choose_mask(config: Sam2Config, decoded: DecodedMasks, ambiguous: Bool[Array, " B"]) -> ChosenMask:
    """Chooses a mask of each object.

    Args:
      config: Configuration.
      decoded: What the decoder predicts.
      ambiguous: Objects of which the best of the three masks is taken, [B] bool. Of the others the single mask is
        taken if its area hardly depends on the threshold, and otherwise the best of the three, too.
    """
    best = 1 + decoded.scores[:, 1:].argmax(-1)
    single = decoded.masks[:, 0]
    inner, outer = ((single > edge).sum((-1, -2)) for edge in (config.stability_delta, -config.stability_delta))
    stable = jnp.where(outer > 0, inner / jnp.maximum(outer, 1), 1.0) >= config.stability_threshold
    if not config.stability_fallback:
        stable = jnp.ones_like(stable)
    index = jnp.where(ambiguous | ~stable, best, 0)
    take = lambda array, at: jnp.take_along_axis(array, at.reshape(-1, *[1] * (array.ndim - 1)), axis=1)[:, 0]  # noqa: E731
    token = take(decoded.tokens, jnp.where(ambiguous, best, 0))
    return ChosenMask(take(decoded.masks, index), take(decoded.scores, index), token)
