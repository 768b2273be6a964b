"""Masks of tokens: a bit for each token of the vocabulary, the lowest bit of a word first, as in llguidance."""

import jax
import jax.numpy as jnp
import numpy as np

_BITS = 32


def mask_words(vocab_size: int) -> int:
    """Returns the number of uint32 words of a mask."""
    return -(-vocab_size // _BITS)


def free_masks(rows: int, vocab_size: int) -> np.ndarray:
    """Returns masks that allow every token, [R, W] uint32."""
    return np.full((rows, mask_words(vocab_size)), 2**_BITS - 1, np.uint32)


def unpack_masks(masks: jax.Array, vocab_size: int) -> jax.Array:
    """Converts masks [R, W] uint32 on a device to [R, V] bool."""
    bits = (masks[:, :, None] >> jnp.arange(_BITS, dtype=jnp.uint32)) & 1
    return bits.reshape(len(masks), -1)[:, :vocab_size].astype(bool)
