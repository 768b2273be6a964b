"""Tests the memory of the compiled tower: linear in patches, no [patches, patches] array, a whole video on a laptop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.samples import random_visual, shape_for
from support.weights import random_params
from vl3_jax.model import VideoLLaMA3, abstract_params, encode, preset
from vl3_jax.parallel.topologies import GIB
from vl3_jax.processing.packed_batch import Sample, pack

# 180 frames of 24 x 14 patches, the grid of a wide video at the released budget (model config "2b").
VIDEO_GRID = (180, 14, 24)


def vision_shapes(patches: int, tokens: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    shape = jax.ShapeDtypeStruct
    return (
        shape((1, 1, patches, 588), jnp.uint8),
        shape((1, 1, patches), jnp.int32),
        shape((1, 1, patches, 2), jnp.int32),
        shape((1, tokens, 4), jnp.int32),
    )


def temporary_bytes(function, *arguments) -> int:
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_of_tower_training_is_linear_in_patches():
    """Compiles forward and backward of two So400m layers for 8k, 16k and 32k patches."""
    config = preset("2b")
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, num_layers=2))
    model = VideoLLaMA3(config, vision_remat="full")
    params = {key: abstract_params(config)[key] for key in ("vision", "projector")}

    def loss(params, *batch):
        return jnp.sum(encode(model, params, *batch))

    patch_counts = [8192, 16_384, 32_768]
    used = [temporary_bytes(jax.grad(loss), params, *vision_shapes(n, n // 4)) for n in patch_counts]
    print("; ".join(f"{n} patches: {size / GIB:.2f} GiB" for n, size in zip(patch_counts, used, strict=True)))
    assert used[2] - used[1] <= 2.1 * (used[1] - used[0])
    score_matrix_bytes = 4 * patch_counts[-1] ** 2
    assert used[2] - used[1] < score_matrix_bytes


def test_a_whole_video_fits_the_memory_of_a_laptop():
    """Compiles all 27 layers for 60,480 patches in float32; parameters and temporaries stay below 24 GB."""
    config = preset("2b")
    model = VideoLLaMA3(config)
    params = {key: abstract_params(config)[key] for key in ("vision", "projector")}
    patches = int(np.prod(VIDEO_GRID))
    used = temporary_bytes(functools.partial(encode, model), params, *vision_shapes(patches, patches // 4))
    weights = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    print(f"{patches} patches: {used / GIB:.1f} GiB of temporaries, {weights / GIB:.1f} GiB of weights")
    assert used + weights < 24e9 * 0.8


@pytest.mark.slow
def test_a_whole_video_can_be_encoded():
    """Runs two layers of the released width (layers run in a loop, in the same memory)."""
    config = preset("2b")
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, num_layers=2))
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, num_layers=1, vocab_size=64))
    params = random_params(config)
    video = random_visual(np.random.default_rng(0), VIDEO_GRID, 2, still=0.5)
    sample = Sample(np.zeros(video.num_tokens), np.ones(video.num_tokens, bool), [video])
    batch = pack([[sample]], shape_for([[sample]]))
    run = jax.jit(functools.partial(encode, VideoLLaMA3(config)))
    features = run(params, *(batch[key] for key in ("patches", "patch_segment", "patch_hw", "token_patches")))
    assert np.all(np.isfinite(features))
    assert np.all(np.std(features[0, : video.num_tokens], axis=-1) > 0)
