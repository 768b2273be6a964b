"""What joins the language model and SAM-2: the hidden state of `[SEG]` becomes a token that prompts the mask decoder.

Dimension names: B objects, D width of the language model, W that of SAM-2, F images or frames, 4G rows and columns of a
low-resolution mask.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vl3_jax.model.vl3 import abstract_params, param_axes
from vl3_jax.sa2va.sa2va_config import Sa2vaConfig
from vl3_jax.sam2.sam2_layers import Mlp
from vl3_jax.sam2.sam2_model import ImageFeatures, ObjectPrompts, Sam2, abstract_sam2, apply, sam2_axes

Params = dict[str, Any]


def joint_layers(config: Sa2vaConfig, param_dtype: DTypeLike = jnp.float32) -> Mlp:
    """Returns `text_hidden_fcs`: two linear layers with ReLU between them, from D to W."""
    width = config.chat.text.hidden_size
    return Mlp((width, width, config.sam2.width), param_dtype)


@functools.partial(jax.jit, static_argnums=0)
def object_vectors(config: Sa2vaConfig, params: Params, hidden: Float[Array, "B D"]) -> Float[Array, "B W"]:
    """Returns the vector of each object that prompts the mask decoder.

    Args:
      config: Configuration.
      params: Parameters of `text_hidden_fcs`.
      hidden: Hidden states after the final norm, where `[SEG]` is what the language model reads.
    """
    vectors: Any = joint_layers(config).apply({"params": params}, hidden)
    return vectors


def vector_prompts(vectors: Float[Array, "B W"]) -> ObjectPrompts:
    """Returns the prompts of objects that vectors stand for: two tokens that are no points, and the vector.

    The best of three masks is taken, always.
    """
    valid = jnp.ones((vectors.shape[0], 1), bool)
    return ObjectPrompts.nothing(vectors.shape[0], True).replace(vectors=vectors[:, None], vectors_valid=valid)


@functools.partial(jax.jit, static_argnums=0)
def draw_objects(
    model: Sam2, params: Params, features: ImageFeatures, vectors: Float[Array, "B W"]
) -> tuple[Float[Array, "B 4G 4G"], Float[Array, " B"], Float[Array, " B"]]:
    """Draws objects in one image, without memory.

    Args:
      model: SAM-2.
      params: Its parameters.
      features: Features of the image, F = 1.
      vectors: Vector of each object.

    Returns:
      Low-resolution logits of each object, their predicted IoU, and the logit of its presence.
    """
    output = apply(model, params, "condition", features, vector_prompts(vectors))
    return output.mask, output.score, output.presence


def abstract_sa2va(config: Sa2vaConfig) -> Params:
    """Returns the parameter tree as `jax.ShapeDtypeStruct` leaves, without allocating anything."""
    sam2 = abstract_sam2(config.sam2)
    joint = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), nn.unbox(_joint_shapes(config)))
    parts = {"sam2": sam2, "stock_decoder": sam2["decoder"], "text_hidden_fcs": joint}
    return {**abstract_params(config.chat), **parts}


def sa2va_axes(config: Sa2vaConfig) -> Params:
    """Returns the parameter tree with the logical axis names of each parameter (see `vl3_jax.parallel.rules`)."""
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    joint = jax.tree.map(lambda leaf: leaf.names, _joint_shapes(config), is_leaf=is_box)
    sam2 = sam2_axes(config.sam2)
    parts = {"sam2": sam2, "stock_decoder": sam2["decoder"], "text_hidden_fcs": joint}
    return {**param_axes(config.chat), **parts}


def _joint_shapes(config: Sa2vaConfig) -> Params:
    hidden = jnp.zeros((1, config.chat.text.hidden_size))
    return jax.eval_shape(joint_layers(config).init, jax.random.key(0), hidden)["params"]
