"""Running the model on a packed batch, with and without its intermediates."""

import functools

import jax
import numpy as np

from vl3_jax.model import VideoLLaMA3, decode, encode, unembed

VISION_KEYS = ("patches", "patch_segment", "patch_hw", "token_patches")
TEXT_KEYS = ("vision_slot", "segment_ids", "positions")


@functools.partial(jax.jit, static_argnums=0)
def forward(model: VideoLLaMA3, params: dict, batch: dict) -> jax.Array:
    """Logits [B, L, vocab] of a packed batch."""
    features = encode(model, params, *(batch[key] for key in VISION_KEYS))
    hidden, _ = decode(model, params, batch["tokens"], features, *(batch[key] for key in TEXT_KEYS))
    return unembed(model, params, hidden)


@functools.partial(jax.jit, static_argnums=0)
def forward_stages(model: VideoLLaMA3, params: dict, batch: dict) -> dict:
    """Every stage by name: arrays in the layout of the batch, layers stacked in front."""
    variables, mutable = {"params": params}, ["intermediates"]
    vision = [batch[key] for key in VISION_KEYS]
    features, tower = model.apply(variables, *vision, method="encode", mutable=mutable)
    text = [batch["tokens"], features, *(batch[key] for key in TEXT_KEYS)]
    (hidden, _), decoder = model.apply(variables, *text, method="decode", mutable=mutable)
    seen = tower["intermediates"]
    return {
        "patch_embed": seen["vision"]["embedded"][0],
        "tower": seen["vision"]["layers"]["out"][0],
        "merged": seen["merged"][0],
        "projected": features,
        "decoder": decoder["intermediates"]["llm"]["layers"]["out"][0],
        "logits": unembed(model, params, hidden),
    }


def to_numpy(tree):
    """The tree with NumPy leaves."""
    return jax.tree.map(np.asarray, tree)
