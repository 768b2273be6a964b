"""Random inputs of the benchmarks: packed rows, samples, and models with random weights."""

import functools
import importlib.util
import pathlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vl3_jax.bench.settings import Settings
from vl3_jax.bench.table import REFERENCE
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.model import VideoLLaMA3, init_params, num_parameters
from vl3_jax.processing.packed_batch import PATCH_DIM, Sample, Visual, block_coordinates

NUM_TEXT_IDS = 480  # ids below are ordinary text in the smallest vocabulary
GREY = (0.5, 0.5, 0.5)  # mean and standard deviation of each channel
# Where a checkout has transformers' side; it belongs to the tests and is not installed.
_REFERENCE_FILE = pathlib.Path(__file__).parents[2] / "tests" / "support" / "reference.py"


def build_reference(build: Callable[[ModuleType], Any]) -> tuple[Any | None, tuple[str, ...]]:
    """Builds a side that runs transformers.

    Args:
      build: Builds it from the reference module of the tests.

    Returns:
      What `build` returns and no notes; or None and a note that says why there is no such side.
    """
    try:
        return build(_reference_module()), ()
    except Exception as error:  # incompatible versions of torch and torchvision raise exceptions of any type
        return None, (f"without {REFERENCE}: {' '.join(str(error).split())[:120]}",)


@functools.cache
def _reference_module() -> ModuleType:
    if not _REFERENCE_FILE.exists():
        raise ImportError("the comparison is part of the tests; run the command in a checkout of the project")
    spec = importlib.util.spec_from_file_location("vl3_jax_reference", _REFERENCE_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class ModelPair(NamedTuple):
    """Our model and the reference with the same random weights.

    Attributes:
      model: Our model.
      params: Its parameters.
      reference: The sides that run transformers' model with the same weights (`ReferenceSides` of
        tests/support/reference.py); None if it is not there.
      notes: Why there is no reference, if there is none.
    """

    model: VideoLLaMA3
    params: dict
    reference: Any | None
    notes: tuple[str, ...]


@functools.lru_cache(maxsize=1)
def model_pair(settings: Settings) -> ModelPair:
    """Initialises the models of the settings, in their type; cached."""
    model = VideoLLaMA3(settings.config, jnp.dtype(settings.dtype), jnp.dtype(settings.dtype))
    theirs, notes = build_reference(lambda module: module.ReferenceSides(settings.config, settings.dtype))
    if theirs is None:
        params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    else:
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, settings.dtype), theirs.params())
    return ModelPair(model, params, theirs, notes)


def segment_info(lengths: list[int], rows: int = 1) -> SegmentInfo:
    """Returns segments and positions of consecutive samples, numbered from the start of every row.

    Args:
      lengths: Lengths of the samples; every row holds as many tokens as the others.
      rows: Number of rows.

    Returns:
      Segment ids and positions, [rows, sum(lengths) / rows] int32 each.
    """
    size = sum(lengths) // rows
    number = np.repeat(np.arange(len(lengths)), lengths).reshape(rows, size)
    positions = np.concatenate([np.arange(length) for length in lengths]).reshape(rows, size)
    return SegmentInfo(jnp.asarray(number - number[:, :1] + 1, jnp.int32), jnp.asarray(positions, jnp.int32))


def random_arrays(dtype: str, *shapes: tuple[int, ...]) -> list[jax.Array]:
    """Generates normally distributed arrays."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def frame_grid(patches: int) -> tuple[int, int]:
    """Returns rows and columns of a frame of `patches` patches, a power of two, as nearly square as possible."""
    height = 2 ** (int(np.log2(patches)) // 2)
    return height, patches // height


def frames(count: int, patches: int, rows: int = 1) -> tuple[np.ndarray, jax.Array, jax.Array]:
    """Generates the tower's input: frames of noise in one text row.

    Args:
      count: Number of frames.
      patches: Patches of each frame, a power of two.
      rows: Number of vision rows R.

    Returns:
      Patches [1, R, N, 588] uint8, their segments [1, R, N] int32 and their coordinates [1, R, N, 2] int32.
    """
    rng = np.random.default_rng(0)
    size = count * patches // rows
    pixels = rng.integers(0, 256, (1, rows, size, PATCH_DIM), np.uint8)
    coordinates = np.tile(block_coordinates(*frame_grid(patches), 1), (count, 1)).reshape(1, rows, size, 2)
    return pixels, segment_info([patches] * count, rows).segment_ids[None], jnp.asarray(coordinates)


def random_sample(rng: np.random.Generator, tokens: int, vision: int) -> Sample:
    """Generates an image of `vision` patches, one token each, and supervised text up to `tokens` tokens."""
    pixels = rng.integers(0, 256, (vision, PATCH_DIM), np.uint8)
    is_vision = np.arange(tokens) < vision
    ids = np.where(is_vision, 0, rng.integers(1, NUM_TEXT_IDS, tokens))
    return Sample(ids, is_vision, [Visual(pixels, (1, *frame_grid(vision)))], (~is_vision).astype(np.float32))


def step_bytes(model: VideoLLaMA3, params: dict, batch: int, length: int) -> int:
    """Returns the bytes that a decoding step reads: the decoder's and unembedding's weights, and each row's cache."""
    text, item_size = model.config.text, jnp.dtype(model.dtype).itemsize
    embedding_lookup = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size
    weights = num_parameters(params["llm"]) - embedding_lookup
    return item_size * (weights + batch * text.cached_values_per_token * length)
