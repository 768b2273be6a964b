"""SAM-2 as one Linen module, whose methods are the steps that segmentation and tracking are made of.

Dimension names: F frames or images, B objects, P points, E extra vectors, D width, m memory width, G rows and columns
of the stride-16 map, N = G * G, 4G rows and columns of a low-resolution mask.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32, UInt8

from vl3_jax.kernels.einsum import einsum
from vl3_jax.model.layers import Linear, partitioned_param
from vl3_jax.processing.object_prompts import NOT_A_POINT
from vl3_jax.processing.resampling import bilinear_matrix
from vl3_jax.sam2.hiera import Hiera
from vl3_jax.sam2.mask_decoder import ABSENT_LOGIT, DecodedMasks, MaskDecoder, choose_mask
from vl3_jax.sam2.memory_attention import MemoryAttention, MemoryTokens
from vl3_jax.sam2.memory_encoder import MemoryEncoder
from vl3_jax.sam2.position_encoding import as_array, sine_distances, sine_grid
from vl3_jax.sam2.prompt_encoder import PromptEncoder
from vl3_jax.sam2.sam2_config import MASK_STRIDE, PATCH_STRIDE, STAGES, Sam2Config
from vl3_jax.sam2.sam2_layers import Conv, Mlp

_MASK_LOGIT = 10.0  # the logits of a mask that is given are plus and minus this


class ImageFeatures(flax.struct.PyTreeNode):
    """Features of images, as the decoder and the memory read them.

    Attributes:
      fine: Projected stride-4 features, [F, 4G, 4G, D / 8].
      middle: Projected stride-8 features, [F, 2G, 2G, D / 4].
      coarse: Stride-16 features without memory, [F, G, G, D].
    """

    fine: Float[Array, "F 4G 4G d"]
    middle: Float[Array, "F 2G 2G d"]
    coarse: Float[Array, "F G G D"]


class ObjectPrompts(flax.struct.PyTreeNode):
    """Points, boxes and vectors that prompt each of B objects, in one frame.

    Attributes:
      points: Column and row in pixels of the input image, [B, P, 2].
      labels: Kind of each point, [B, P] int32; see `vl3_jax.processing.object_prompts`. A box is its two corners. The
        last token of a prompt is `NOT_A_POINT`.
      ambiguous: Objects of which the best of three masks is taken, [B] bool.
      vectors: Further tokens, [B, E, D].
      vectors_valid: Those that are not padding, [B, E] bool.
    """

    points: Float[Array, "B P 2"]
    labels: Int32[Array, "B P"]
    ambiguous: Bool[Array, " B"]
    vectors: Float[Array, "B E D"] | None = None
    vectors_valid: Bool[Array, "B E"] | None = None

    @classmethod
    def nothing(cls, objects: int, ambiguous: bool) -> "ObjectPrompts":
        """Returns the prompts of objects that nobody points at: two tokens that are no points."""
        labels = jnp.full((objects, 2), NOT_A_POINT, jnp.int32)
        return cls(jnp.zeros((objects, 2, 2)), labels, jnp.full(objects, ambiguous))


class ObjectOutput(flax.struct.PyTreeNode):
    """What a frame shows of each object.

    Attributes:
      mask: Low-resolution logits, [B, 4G, 4G].
      score: Predicted IoU of the mask, [B].
      presence: Logit of the object being in the frame, [B].
      pointer: Object pointer, [B, D].
    """

    mask: Float[Array, "B 4G 4G"]
    score: Float[Array, " B"]
    presence: Float[Array, " B"]
    pointer: Float[Array, "B D"]


class Sam2(nn.Module):
    """Segmentation and tracking by prompts; holds no parameters itself.

    Attributes:
      config: Sizes and settings.
      dtype: Dtype of the activations; weights are cast to it where they are used.
      param_dtype: Dtype of the parameters that `init_sam2` creates.
    """

    config: Sam2Config
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def setup(self):
        config, dtype, width = self.config, self.param_dtype, self.config.width
        self.trunk = Hiera(config.hiera, dtype)
        # From stride 32 to stride 4.
        self.laterals = [
            Linear((channels, width), ("vision_embed", None), param_dtype=dtype)
            for channels in config.hiera.widths[::-1]
        ]
        self.prompt = PromptEncoder(config, dtype)
        self.decoder = MaskDecoder(config, dtype)
        self.memory_attention = MemoryAttention(config, dtype)
        self.memory_encoder = MemoryEncoder(config, dtype)
        self.pointer = Mlp((width, width, width, width), dtype)
        self.mask_downsample = Conv((MASK_STRIDE, MASK_STRIDE, 1, 1), MASK_STRIDE, param_dtype=dtype)
        parameter = lambda name, *shape: partitioned_param(  # noqa: E731
            self, name, nn.initializers.normal(0.02), shape, (*[None] * (len(shape) - 1), "embed"), dtype
        )
        self.no_memory = parameter("no_memory", width)
        self.no_memory_position = parameter("no_memory_position", width)  # in every checkpoint; nothing reads it
        self.memory_time = parameter("memory_time", config.num_memories, config.memory_width)
        self.no_pointer = parameter("no_pointer", width)
        if config.occlusion:
            self.occluded = parameter("occluded", config.memory_width)
        if config.pointer_time:
            self.pointer_time = Linear((width, config.memory_width), ("embed", None), param_dtype=dtype)

    def image_positions(self) -> Float[Array, "cells C"]:
        """Returns what the trunk adds to the patches of every image."""
        with jax.named_scope("trunk"):
            return self.trunk.positions(self.config.image_size // PATCH_STRIDE).astype(self.dtype)

    def encode_image(
        self,
        pixels: UInt8[Array, "F size size 3"] | Float[Array, "F size size 3"],
        positions: Float[Array, "cells C"] | None = None,
    ) -> ImageFeatures:
        """Encodes images.

        Args:
          pixels: Pixels at the size of the input, uint8; or already normalised floats.
          positions: From `image_positions`; None computes them.
        """
        positions = self.image_positions() if positions is None else positions
        with jax.named_scope("trunk"):
            stages = self.trunk(self._normalise(pixels).astype(self.dtype), positions)
        with jax.named_scope("neck"):
            lateral = [self.laterals[STAGES - 1 - stage](x.cells) for stage, x in enumerate(stages)]
            # Cells are put in order when they have the fewest channels.
            fine, middle = self.decoder.high_resolution(lateral[0], lateral[1])
            top_down = stages[3].maps(lateral[3]).repeat(2, axis=1).repeat(2, axis=2)
            return ImageFeatures(stages[0].maps(fine), stages[1].maps(middle), stages[2].maps(lateral[2]) + top_down)

    def segment(
        self, features: ImageFeatures, prompts: ObjectPrompts, masks: Float[Array, "B 4G 4G"] | None = None
    ) -> DecodedMasks:
        """Segments objects of one image, or of an image each, without memory.

        Args:
          features: Features of the image, F = 1 or B.
          prompts: Points, boxes and vectors.
          masks: Low-resolution logits of earlier masks, which prompt too.
        """
        return self._decode(features, features.coarse + self.no_memory.astype(self.dtype), prompts, masks)

    def condition(self, features: ImageFeatures, prompts: ObjectPrompts) -> ObjectOutput:
        """Segments prompted objects of a frame that begins, or renews, what is remembered of them."""
        return self._output(self.segment(features, prompts), prompts.ambiguous)

    def condition_on_mask(self, features: ImageFeatures, masks: Float[Array, "B size size"]) -> ObjectOutput:
        """Takes given masks of 0 and 1, at the size of the input image, as what a frame shows of the objects."""
        prompts = ObjectPrompts.nothing(masks.shape[0], True)
        dense = self.mask_downsample(masks[..., None].astype(self.dtype))[..., 0]
        output = self._output(self._decode(features, features.coarse, prompts, dense), prompts.ambiguous)
        present = (masks > 0).any((-1, -2))
        pointer = jnp.where(present[:, None], output.pointer, self.no_pointer.astype(self.dtype))
        matrix = jnp.asarray(bilinear_matrix(self.config.image_size, self.config.mask_size, antialias=True))
        low = einsum("yi,bij,xj->byx", matrix, mask_logits(masks), matrix)
        return ObjectOutput(low, jnp.ones(masks.shape[0]), jnp.where(present, 1, -1) * _MASK_LOGIT, pointer)

    def track(self, features: ImageFeatures, memory: MemoryTokens, prompts: ObjectPrompts) -> ObjectOutput:
        """Finds objects in a frame by what is remembered of them, and by correction clicks where there are any."""
        with jax.named_scope("memory_attention"):
            grid, width = self.config.grid, self.config.width
            placed = features.coarse + 0.1 * as_array(sine_grid(grid, width), self.dtype)
            placed = jnp.broadcast_to(placed.reshape(-1, grid**2, width), (memory.tokens.shape[0], grid**2, width))
            coarse = self.memory_attention(placed, memory).reshape(-1, grid, grid, width)
        return self._output(self._decode(features, coarse, prompts, None), prompts.ambiguous)

    def remember(
        self,
        features: ImageFeatures,
        masks: Float[Array, "B size size"],
        presence: Float[Array, " B"],
        prompted: Bool[Array, " B"],
    ) -> Float[Array, "B N m"]:
        """Encodes what a frame shows of the objects.

        Args:
          features: Features of the frame.
          masks: Logits at the size of the input image.
          presence: Logits of the objects being there.
          prompted: Objects whose mask follows from a prompt, [B] bool.
        """
        config = self.config
        with jax.named_scope("memory_encoder"):
            shares = jax.nn.sigmoid(masks)
            if config.binarize_prompted_memory:
                shares = jnp.where(prompted[:, None, None], (masks > 0).astype(shares.dtype), shares)
            memory = self.memory_encoder(features.coarse, shares * config.memory_scale + config.memory_bias)
            if config.occlusion:
                absent = (presence <= 0)[:, None, None, None]
                memory += jnp.where(absent, self.occluded.astype(memory.dtype), 0)
            return memory.reshape(memory.shape[0], -1, config.memory_width)

    def memory_positions(self) -> tuple[Float[Array, "N m"], Float[Array, "memories m"]]:
        """Returns the positions of a memory's cells and of its distance in time; the last is of conditioning frames."""
        grid, width = self.config.grid, self.config.memory_width
        return as_array(sine_grid(grid, width), self.dtype).reshape(-1, width), self.memory_time.astype(self.dtype)

    def pointer_positions(self, distances: Float[Array, "B n"], longest: Float[Array, ""]) -> Float[Array, "B n m"]:
        """Returns the positions of object pointers.

        Args:
          distances: Frames between each pointer and the current frame.
          longest: Distance that counts as 1.
        """
        if not self.config.pointer_time:
            return jnp.zeros((*distances.shape, self.config.memory_width), self.dtype)
        return self.pointer_time(sine_distances(distances / longest, self.config.width).astype(self.dtype))

    def init_all(self):
        """Uses every parameter once, so that `init` creates all of them."""
        size = self.config.image_size
        features = self.encode_image(jnp.zeros((1, size, size, 3), self.dtype))
        masks = jnp.zeros((1, size, size), self.dtype)
        output = self.condition_on_mask(features, masks)
        memory = self.remember(features, masks, output.presence, jnp.ones(1, bool))
        positions, _ = self.memory_positions()
        pointers = self.pointer_positions(jnp.zeros((1, 1)), jnp.ones(()))[:, :0]
        tokens = MemoryTokens(memory, positions[None], pointers, jnp.ones(memory.shape[:2], bool))
        return self.track(features, tokens, ObjectPrompts.nothing(1, True)).mask

    def _normalise(self, pixels: jax.Array) -> jax.Array:
        if pixels.dtype != jnp.uint8:
            return pixels
        mean, std = (jnp.asarray(values, jnp.float32) for values in (self.config.image_mean, self.config.image_std))
        return (pixels.astype(jnp.float32) * (1 / 255) - mean) / std

    def _decode(self, features: ImageFeatures, coarse, prompts: ObjectPrompts, masks) -> DecodedMasks:
        with jax.named_scope("mask_decoder"):
            tokens = self.prompt.points(prompts.points, prompts.labels, prompts.vectors, prompts.vectors_valid)
            dense = self.prompt.no_mask if masks is None else self.prompt.mask(masks.astype(self.dtype))
            return self.decoder(coarse, features.fine, features.middle, tokens, dense, self.prompt.positions())

    def _output(self, decoded: DecodedMasks, ambiguous: Bool[Array, " B"]) -> ObjectOutput:
        chosen, present = choose_mask(self.config, decoded, ambiguous), decoded.presence > 0
        mask = chosen.mask
        if self.config.mask_absent_objects:
            mask = jnp.where(present[:, None, None], mask, ABSENT_LOGIT)
        pointer = jnp.where(present[:, None], self.pointer(chosen.token), self.no_pointer.astype(self.dtype))
        return ObjectOutput(mask, chosen.score, decoded.presence, pointer)


def mask_logits(masks: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the logits of masks of 0 and 1 that are given."""
    return (2 * masks.astype(jnp.float32) - 1) * _MASK_LOGIT


def enlarge(masks: Float[Array, "B low low"], size: int) -> Float[Array, "B size size"]:
    """Enlarges low-resolution logits to `size` rows and columns, bilinearly."""
    matrix = jnp.asarray(bilinear_matrix(masks.shape[-1], size))
    return einsum("yi,bij,xj->byx", matrix, masks.astype(jnp.float32), matrix)


def apply(model: Sam2, params: dict, method: str | Callable, *arguments) -> Any:
    """Runs a method of the model, or a function of the bound module."""
    return model.apply({"params": params}, *arguments, method=method)


def init_sam2(model: Sam2, key: jax.Array) -> dict:
    """Creates random parameters as a plain nested dict."""
    return nn.unbox(model.init(key, method="init_all")["params"])


@functools.lru_cache
def _boxed_shapes(config: Sam2Config, param_dtype: DTypeLike = jnp.float32) -> dict:
    model = Sam2(config, param_dtype=param_dtype)
    return jax.eval_shape(lambda key: model.init(key, method="init_all"), jax.random.key(0))["params"]


def abstract_sam2(config: Sam2Config, param_dtype: DTypeLike = jnp.float32) -> dict:
    """Returns the parameter tree as `jax.ShapeDtypeStruct` leaves, without allocating anything."""
    return nn.unbox(_boxed_shapes(config, param_dtype))


def sam2_axes(config: Sam2Config) -> dict:
    """Returns the parameter tree with the logical axis names of each parameter (see `vl3_jax.parallel.rules`)."""
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.names, _boxed_shapes(config), is_leaf=is_box)
