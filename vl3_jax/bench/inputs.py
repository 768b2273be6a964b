"""Packed rows and samples of noise, and weights to run them through."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vl3_jax.bench import reference
from vl3_jax.bench.settings import Settings
from vl3_jax.model import VideoLLaMA3, init_params
from vl3_jax.processing.packed_batch import PATCH_DIM, Sample, Visual, block_coordinates

WORDS = 480  # ordinary ids of the smallest vocabulary


class Weights(NamedTuple):
    """A model of random weights on both sides."""

    model: VideoLLaMA3
    params: dict
    reference: Any | None  # transformers' model with the same weights, where it is installed
    notes: tuple[str, ...]  # why there is none


@functools.lru_cache(maxsize=1)
def weights(settings: Settings) -> Weights:
    """Of the settings' model, in their type; made once."""
    model = VideoLLaMA3(settings.config, jnp.dtype(settings.dtype), jnp.dtype(settings.dtype))
    missing = reference.why_missing()
    if missing:
        params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
        return Weights(model, params, None, (missing,))
    theirs = reference.reference_model(settings.config, settings.dtype)
    params = reference.native_params(reference.tensors(theirs), settings.config)
    return Weights(model, jax.tree.map(lambda leaf: jnp.asarray(leaf, settings.dtype), params), theirs, ())


def labels(lengths: list[int], rows: int = 1) -> tuple[jax.Array, jax.Array]:
    """Segments and positions, [rows, sum of lengths / rows] int32 each, numbered anew in every row."""
    size = sum(lengths) // rows
    number = np.repeat(np.arange(len(lengths)), lengths).reshape(rows, size)
    position = np.concatenate([np.arange(length) for length in lengths]).reshape(rows, size)
    return jnp.asarray(number - number[:, :1] + 1, jnp.int32), jnp.asarray(position, jnp.int32)


def grid_of(patches: int) -> tuple[int, int]:
    """Rows and columns of a frame of that many patches, a power of two; as near to a square as may be."""
    height = 2 ** (int(np.log2(patches)) // 2)
    return height, patches // height


def frames(count: int, patches: int, rows: int = 1) -> tuple[np.ndarray, jax.Array, jax.Array]:
    """The tower's input: `count` frames of noise in `rows` vision rows: patches, their segments and coordinates."""
    rng = np.random.default_rng(0)
    size = count * patches // rows
    pixels = rng.integers(0, 256, (1, rows, size, PATCH_DIM), np.uint8)
    places = np.tile(block_coordinates(*grid_of(patches), 1), (count, 1)).reshape(1, rows, size, 2)
    return pixels, labels([patches] * count, rows)[0][None], jnp.asarray(places)


def question(rng: np.random.Generator, tokens: int, vision: int) -> Sample:
    """A picture of `vision` patches, a token each, and text to fill `tokens`; all text is supervised."""
    pixels = rng.integers(0, 256, (vision, PATCH_DIM), np.uint8)
    is_vision = np.arange(tokens) < vision
    words = np.where(is_vision, 0, rng.integers(1, WORDS, tokens))
    return Sample(words, is_vision, [Visual(pixels, (1, *grid_of(vision)))], (~is_vision).astype(np.float32))
