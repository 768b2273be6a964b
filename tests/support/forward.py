"""Runs the model on a packed batch, with and without its intermediate results."""

import functools

import jax
import numpy as np

from vl3_jax.model import VideoLLaMA3, decode, encode, unembed

VISION_KEYS = ("patches", "patch_segment", "patch_hw", "token_patches")
TEXT_KEYS = ("vision_slot", "segment_ids", "positions")


@functools.partial(jax.jit, static_argnums=0)
def forward(model: VideoLLaMA3, params: dict, batch: dict) -> jax.Array:
    """Returns the logits [B, L, vocab] of a packed batch."""
    features = encode(model, params, *(batch[key] for key in VISION_KEYS))
    hidden, _ = decode(model, params, batch["tokens"], features, *(batch[key] for key in TEXT_KEYS))
    return unembed(model, params, hidden)


@functools.partial(jax.jit, static_argnums=0)
def forward_stages(model: VideoLLaMA3, params: dict, batch: dict) -> dict:
    """Returns the output of every stage by name, in the layout of the batch with layers as leading dimension."""
    variables, mutable = {"params": params}, ["intermediates"]
    vision = [batch[key] for key in VISION_KEYS]
    features, tower = model.apply(variables, *vision, method="encode", mutable=mutable)
    text = [batch["tokens"], features, *(batch[key] for key in TEXT_KEYS)]
    (hidden, _), decoder = model.apply(variables, *text, method="decode", mutable=mutable)
    vision_outputs = tower["intermediates"]
    return {
        "patch_embed": vision_outputs["vision"]["embedded"][0],
        "tower": vision_outputs["vision"]["layers"]["out"][0],
        "merged": vision_outputs["merged"][0],
        "projected": features,
        "decoder": decoder["intermediates"]["llm"]["layers"]["out"][0],
        "logits": unembed(model, params, hidden),
    }


def to_numpy(tree):
    """Converts the leaves of a tree to NumPy arrays."""
    return jax.tree.map(np.asarray, tree)
