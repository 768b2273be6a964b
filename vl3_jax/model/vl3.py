"""VideoLLaMA3 as three pure functions: `encode` images and frames, `decode` text, `unembed` hidden states.

All three take the arrays of a packed batch (docs/architecture.md) and the parameters as a plain nested dict.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, UInt8

from vl3_jax.model.cache import KVCache
from vl3_jax.model.config import ModelConfig
from vl3_jax.model.decoder import Decoder
from vl3_jax.model.vision import Projector, VisionTower, merge_patches
from vl3_jax.private_files import kept


class VideoLLaMA3(nn.Module):
    """The model as a Linen module, which holds no parameters itself.

    Attributes:
      config: Sizes of the model.
      dtype: Dtype of the activations; weights are cast to it where they are used.
      param_dtype: Dtype of the parameters that `init_params` creates.
      vision_remat: Rematerialisation policy of the tower's layers, a key of `vl3_jax.model.remat.POLICIES`.
      text_remat: Rematerialisation policy of the decoder's layers, a key of the same table.
      serving: Whether the parameters are in the layout for serving (`vl3_jax.model.serving_layout`), not in that of
        training and of checkpoints.
      cache_dtype: Dtype of the keys and values that inference caches; None is `dtype`.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    vision_remat: str = "none"
    text_remat: str = "none"
    serving: bool = False
    cache_dtype: DTypeLike | None = None

    def setup(self):
        types = self.dtype, self.param_dtype
        self.vision = VisionTower(self.config.vision, *types, self.vision_remat, self.serving)
        self.projector = Projector(self.config, self.param_dtype)
        self.llm = Decoder(self.config.text, *types, self.text_remat, self.serving)

    def encode(self, patches, patch_segment, patch_hw, token_patches):
        features = self.vision(patches, patch_segment, patch_hw)
        with jax.named_scope("merge"):
            merged = merge_patches(features, token_patches)
            self.sow("intermediates", "merged", merged)
        with jax.named_scope("projector"):
            return self.projector(merged)

    def decode(self, tokens, features, vision_slot, segment_ids, positions, cache=None, rows=None, adapter=None):
        return self.llm(tokens, features, vision_slot, segment_ids, positions, cache, rows, adapter)

    def unembed(self, hidden):
        return self.llm.unembed(hidden)

    def init_all(self):
        """Uses every parameter once, so that `init` creates all of them."""
        patch = jnp.zeros((1, 1, 1), jnp.int32)
        pixels = jnp.zeros((1, 1, 1, self.config.vision.patch_dim), self.dtype)
        features = self.encode(pixels, patch, jnp.zeros((1, 1, 1, 2), jnp.int32), patch)
        token = jnp.zeros((1, 1), jnp.int32)
        return self.unembed(self.decode(token, features, token, token, token)[0])


def encode(
    model: VideoLLaMA3,
    params: dict,
    patches: UInt8[Array, "B R N P"] | Float[Array, "B R N P"],
    patch_segment: Int32[Array, "B R N"],
    patch_hw: Int32[Array, "B R N 2"],
    token_patches: Int32[Array, "B T 4"],
) -> Float[Array, "B T D"]:
    """Encodes images and video frames into vision tokens: tower, merge and projector.

    Args:
      model: The model.
      params: Parameters of the model, at least those of the tower and the projector.
      patches: Patches, [B, R, N, 588] uint8, or already normalised floats.
      patch_segment: Image or video frame of each patch, [B, R, N] int32, counted from 1; 0 = padding.
      patch_hw: Row and column of each patch in the frame's own grid, [B, R, N, 2] int32.
      token_patches: Patches whose mean is each vision token, [B, T, 4] int32 indices into R * N; -1 = none.

    Returns:
      Vision tokens, [B, T, D].
    """
    return _apply(model, params, "encode", patches, patch_segment, patch_hw, token_patches)


def decode(
    model: VideoLLaMA3,
    params: dict,
    tokens: Int32[Array, "B L"],
    features: Float[Array, "B T D"] | None,
    vision_slot: Int32[Array, "B L"],
    segment_ids: Int32[Array, "B L"],
    positions: Int32[Array, "B L"],
    cache: KVCache | None = None,
    rows: Int32[Array, " B"] | None = None,
    adapter: Int32[Array, " B"] | None = None,
) -> tuple[Float[Array, "B L D"], KVCache | None]:
    """Computes the hidden states of packed rows of text and vision tokens.

    With a cache, the same function serves prefill and every decoding step.

    Args:
      model: The model.
      params: Parameters of the model, at least those of the decoder.
      tokens: Token ids, [B, L] int32; ignored where a vision token is inserted.
      features: Vision tokens from `encode`, [B, T, D]; None for text without images or videos.
      vision_slot: Index of the vision token to insert at each position, [B, L] int32; -1 = none. An index may occur
        more than once.
      segment_ids: Packed sample of each token, [B, L] int32, counted from 1; 0 = padding.
      positions: Position of each token, [B, L] int32; starts at 0 in each sample.
      cache: Keys and values of earlier calls. The new tokens are appended and attend to it.
      rows: Row of the cache of each row of tokens, [B] int32, all different; None where they are the same.
      adapter: LoRA adapter of each row of tokens, [B] int32, if the parameters have any (`vl3_jax.model.adapters`);
        below 0 for none, None for no row.

    Returns:
      Hidden states after the final norm, [B, L, D], and the cache with the new tokens (None without a cache).
    """
    text = tokens, features, vision_slot, segment_ids, positions
    return _apply(model, params, "decode", *text, cache, rows, adapter)


def unembed(model: VideoLLaMA3, params: dict, hidden: Float[Array, "... D"]) -> Float32[Array, "... V"]:
    """Returns the logits of hidden states, in float32 whatever their dtype."""
    return _apply(model, params, "unembed", hidden)


def _apply(model: VideoLLaMA3, params: dict, method: str, *arguments) -> Any:
    return model.apply({"params": params}, *arguments, method=method)


def init_params(model: VideoLLaMA3, key: jax.Array) -> dict:
    """Creates random parameters as a plain nested dict.

    Under `jit` with `out_shardings` each device creates only its own shards.
    """
    return nn.unbox(model.init(key, method="init_all")["params"])


@kept  # tracing takes as long as much of a warm start
def _boxed_shapes(config: ModelConfig, serving: bool) -> dict:
    """Returns the parameter tree with the axes of each parameter, from a model with one layer of each kind."""
    one = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, num_layers=1),
        text=dataclasses.replace(config.text, num_layers=1),
    )
    init = functools.partial(VideoLLaMA3(one, serving=serving).init, method="init_all")
    boxed = dict(jax.eval_shape(init, jax.random.key(0))["params"])
    for part, layers in (("vision", config.vision.num_layers), ("llm", config.text.num_layers)):
        tree = dict(boxed[part])
        if serving:
            layer = tree.pop("layers_0")
            tree |= {f"layers_{index}": layer for index in range(layers)}
        else:
            tree["layers"] = jax.tree.map(functools.partial(_stacked, layers), tree["layers"])
        boxed[part] = tree
    return boxed


def _stacked(layers: int, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return _shape((layers, *leaf.shape[1:]))


def _shape(shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def abstract_params(config: ModelConfig, param_dtype: DTypeLike = jnp.float32, serving: bool = False) -> dict:
    """Returns the parameter tree as `jax.ShapeDtypeStruct` leaves, without allocating anything.

    Args:
      config: Sizes of the model.
      param_dtype: Dtype of the parameters.
      serving: See `VideoLLaMA3`.
    """
    return jax.tree.map(lambda leaf: _shape(leaf.shape, param_dtype), nn.unbox(_boxed_shapes(config, serving)))


def num_parameters(params: dict) -> int:
    """Returns the number of values in a tree of parameters, or of their shapes; tied embeddings are counted once."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def param_axes(config: ModelConfig, serving: bool = False) -> dict:
    """Returns the parameter tree with the logical axis names of each parameter (see `vl3_jax.parallel.rules`).

    Args:
      config: Sizes of the model.
      serving: See `VideoLLaMA3`.
    """
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.names, _boxed_shapes(config, serving), is_leaf=is_box)
