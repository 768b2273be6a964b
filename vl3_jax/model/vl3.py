"""VideoLLaMA3 in three pure functions: `encode` pictures and frames, `decode` text, `unembed` hidden states.

All take the arrays of one packed batch (docs/architecture.md) and the parameters as a plain nested dict.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vl3_jax.model.cache import KVCache
from vl3_jax.model.config import ModelConfig
from vl3_jax.model.decoder import Decoder
from vl3_jax.model.vision import Projector, VisionTower, merge_patches


class VideoLLaMA3(nn.Module):
    """Structure and numerics of the model; it holds no parameters itself.

    Attributes:
      config: sizes.
      dtype: type of the activations (and, by a cast where they are used, of the weights).
      param_dtype: type in which `init_params` makes the parameters.
      vision_remat, text_remat: names from `vl3_jax.model.remat.POLICIES`.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    vision_remat: str = "none"
    text_remat: str = "none"

    def setup(self):
        self.vision = VisionTower(self.config.vision, self.dtype, self.param_dtype, self.vision_remat)
        self.projector = Projector(self.config, self.param_dtype)
        self.llm = Decoder(self.config.text, self.dtype, self.param_dtype, self.text_remat)

    def encode(self, patches, patch_segment, patch_hw, token_patches):
        """See the function `encode`."""
        features = self.vision(patches, patch_segment, patch_hw)
        with jax.named_scope("merge"):
            merged = merge_patches(features, token_patches)
            self.sow("intermediates", "merged", merged)
        with jax.named_scope("projector"):
            return self.projector(merged)

    def decode(self, tokens, features, vision_slot, segment_ids, positions, cache=None):
        """See the function `decode`."""
        return self.llm(tokens, features, vision_slot, segment_ids, positions, cache)

    def unembed(self, hidden):
        """See the function `unembed`."""
        return self.llm.unembed(hidden)

    def init_all(self):
        """Uses every parameter once, for initialisation."""
        patch = jnp.zeros((1, 1, 1), jnp.int32)
        pixels = jnp.zeros((1, 1, 1, self.config.vision.patch_dim), self.dtype)
        features = self.encode(pixels, patch, jnp.zeros((1, 1, 1, 2), jnp.int32), patch)
        token = jnp.zeros((1, 1), jnp.int32)
        return self.unembed(self.decode(token, features, token, token, token)[0])


def encode(
    model: VideoLLaMA3,
    params: dict,
    patches: jax.Array,
    patch_segment: jax.Array,
    patch_hw: jax.Array,
    token_patches: jax.Array,
) -> jax.Array:
    """Pictures and frames to vision tokens: tower, merge, projector.

    Args:
      patches: [B, R, N, 588] uint8 (normalised here), or float that is normalised already.
      patch_segment: [B, R, N] int32, 1.. per picture or video frame, 0 = padding.
      patch_hw: [B, R, N, 2] int32, row and column in the frame's own grid.
      token_patches: [B, T, 4] int32, the patches (index into R * N) whose mean is this token, -1 = none.

    Returns:
      features [B, T, D].
    """
    return model.apply({"params": params}, patches, patch_segment, patch_hw, token_patches, method="encode")


def decode(
    model: VideoLLaMA3,
    params: dict,
    tokens: jax.Array,
    features: jax.Array | None,
    vision_slot: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
    cache: KVCache | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Packed rows of text and vision tokens to hidden states; with a cache, prefill and each later step alike.

    Args:
      tokens: [B, L] int32; anything where a vision token goes.
      features: [B, T, D] from `encode`, or None where there is nothing to see.
      vision_slot: [B, L] int32, which vision token stands here, -1 = none; an index may occur more than once.
      segment_ids: [B, L] int32, 1.. per packed sample, 0 = padding.
      positions: [B, L] int32, restart at 0 in each sample.
      cache: what earlier calls wrote; the new tokens are appended and see it.

    Returns:
      hidden [B, L, D] after the final norm, and the cache with the new tokens (None without one).
    """
    arguments = (tokens, features, vision_slot, segment_ids, positions, cache)
    return model.apply({"params": params}, *arguments, method="decode")


def unembed(model: VideoLLaMA3, params: dict, hidden: jax.Array) -> jax.Array:
    """Hidden states [..., D] to logits [..., vocab], float32."""
    return model.apply({"params": params}, hidden, method="unembed")


def init_params(model: VideoLLaMA3, key: jax.Array) -> dict:
    """Random parameters as a plain nested dict; under `jit` with `out_shardings`, made where they will live."""
    return nn.unbox(model.init(key, method="init_all")["params"])


@functools.lru_cache
def _boxed_shapes(model: VideoLLaMA3) -> dict:
    return jax.eval_shape(functools.partial(model.init, method="init_all"), jax.random.key(0))["params"]


def abstract_params(config: ModelConfig, param_dtype: DTypeLike = jnp.float32) -> dict:
    """Shapes and types of the parameter tree, nothing allocated."""
    return nn.unbox(_boxed_shapes(VideoLLaMA3(config, param_dtype=param_dtype)))


def param_axes(config: ModelConfig) -> dict:
    """The same tree with the logical axis names of each parameter (see `vl3_jax.parallel.rules`)."""
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.names, _boxed_shapes(VideoLLaMA3(config)), is_leaf=is_box)
