"""Tests that int8 weights stay close to the original model and take a fraction of its memory."""

import jax
import numpy as np

from support.forward import forward
from support.samples import random_sample, random_visual, shape_for
from support.weights import random_params
from vl3_jax.model import VideoLLaMA3, preset
from vl3_jax.model.quantize import QuantizedKernel, quantize_leaf
from vl3_jax.model.serving_layout import to_serving
from vl3_jax.processing.packed_batch import pack


def test_logits_stay_close_and_memory_shrinks():
    model = VideoLLaMA3(preset("mid"), serving=True)
    weights = random_params(model.config)
    params, quantized = (to_serving(weights, model.config, quantize) for quantize in (None, "int8"))
    rng = np.random.default_rng(0)
    rows = [[random_sample(rng, [random_visual(rng, (2, 4, 6), 2)], text=20)]]
    batch = pack(rows, shape_for(rows))
    expected, logits = (np.asarray(forward(model, tree, batch))[0, :40] for tree in (params, quantized))
    error = np.sqrt(np.mean((logits - expected) ** 2) / np.mean(expected**2))
    bytes_before, bytes_after = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (params, quantized))
    print(f"int8: relative error {error:.3f}, {bytes_after / bytes_before:.2f} of the float32 bytes")
    assert 0 < error < 0.05
    assert bytes_after < 0.35 * bytes_before


def test_every_channel_has_its_own_scale():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((4, 8, 16)).astype(np.float32) * np.geomspace(0.01, 100, 16, dtype=np.float32)
    result = quantize_leaf("vision/layers_0/attn/out/kernel", jax.device_put(kernel))
    assert isinstance(result, QuantizedKernel)
    assert (result.values.shape, result.scale.shape) == ((16, 4, 8), (16, 1, 1))
    error = np.abs(result.values * np.asarray(result.scale) - np.moveaxis(kernel, -1, 0))
    assert np.all(error <= np.asarray(result.scale) * 0.5001)


def test_small_or_sensitive_parameters_are_not_quantised():
    for path in ("llm/embed/embedding", "vision/patch_embed/kernel", "projector/fc1/kernel", "llm/norm/scale"):
        leaf = jax.numpy.ones((4, 4))
        assert quantize_leaf(path, leaf) is leaf
