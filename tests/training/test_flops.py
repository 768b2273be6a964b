"""The FLOPs of a step against the matrix products of the traced program, and against counts by hand."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import MODEL, long_batch

from support.forward import TEXT_KEYS, VISION_KEYS
from support.samples import random_sample, random_visual, shape_for
from vl3_jax.kernels.dense import dense_attention
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.model import VideoLLaMA3, abstract_params, decode, decoder, encode, preset, unembed, vision
from vl3_jax.processing.packed_batch import pack
from vl3_jax.training.flops import StepFlops, StepWork, count_work, peak_flops, step_flops
from vl3_jax.training.groups import MODULES, WITH_LORA, assign, merge, split, trainable_mask
from vl3_jax.training.lora import add_adapters
from vl3_jax.training.step import batch_loss

RANK = 4


def product_flops(jaxpr, times: int = 1) -> int:
    """Counts the FLOPs of the matrix products of a program, without the loops over blocks of attention and loss.

    A product with a constant is a sum, such as that of a bias's gradient, and does not count.
    """
    total, constants = 0, set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "broadcast_in_dim" and isinstance(eqn.invars[0], jax.extend.core.Literal):
            constants.add(eqn.outvars[0])
        if eqn.primitive.name == "dot_general" and not constants.intersection(eqn.invars):
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += times * 2 * depth * math.prod(eqn.outvars[0].aval.shape)
        elif eqn.primitive.name not in ("while", "dot_general"):
            length = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            for sub in jax.extend.core.jaxprs_in_params(eqn.params):
                total += product_flops(sub, times * length)
    return total


@pytest.mark.parametrize(
    "trainable",
    [(), ("projector",), ("vision", "projector"), ("llm",), ("vision",), ("vision", "projector", "llm"), ("lora",)],
    ids=lambda trainable: "+".join(trainable) or "evaluation",
)
def test_flops_equal_the_products_of_the_traced_program(trainable):
    batch, adapted = long_batch(2), "lora" in trainable
    params = abstract_params(MODEL.config)
    if adapted:
        params = jax.eval_shape(functools.partial(add_adapters, rank=RANK), params, jax.random.key(0))

    def loss(trainable_params, frozen_params, batch):
        return batch_loss(MODEL, merge(trainable_params, frozen_params), batch).loss

    if trainable:
        groups = assign(params, WITH_LORA if adapted else MODULES)
        learning_rates = {group: float(group in trainable) for group in set(jax.tree.leaves(groups))}
        program = jax.make_jaxpr(jax.grad(loss))(*split(params, trainable_mask(groups, learning_rates)), batch)
    else:
        program = jax.make_jaxpr(loss)(params, jax.tree.map(lambda leaf: None, params), batch)
    # Without pairs and targets only linear layers count; the program multiplies padding too.
    tokens, vision_tokens = batch["tokens"].size, batch["token_patches"][..., 0].size
    work = StepWork(batch["patch_segment"].size, 0, vision_tokens, tokens, 0, 0)
    flops = step_flops(MODEL.config, work, trainable, RANK if adapted else 0)
    assert product_flops(program.jaxpr) == flops["total" if trainable else "forward"]


def test_work_is_counted_without_padding():
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0]])
    patch_segments = np.array([[[1, 1, 2, 2, 2, 2], [1, 0, 0, 0, 0, 0]], [[0] * 6, [1, 1, 1, 0, 0, 0]]])
    token_patches = np.array([[[0, 1, -1, -1], [-1] * 4], [[5, -1, -1, -1], [6, -1, -1, -1]]])
    weight = np.array([[0, 0.5, 0, 2, -1, 0], [0] * 6])
    text = {"segment_ids": segments, "loss_weight": weight}
    batch = text | {"patch_segment": patch_segments, "token_patches": token_patches}
    work = count_work(batch)
    assert work == StepWork(10, 4 + 16 + 1 + 9, 3, 6, 6 + 3 + 1, 3)
    assert work + work == StepWork(20, 60, 6, 12, 20, 6)
    assert count_work(text) == StepWork(0, 0, 0, 6, 10, 3)


def test_attention_and_unembedding_by_hand():
    config = preset("tiny")
    none = {"patches": 0, "patch_pairs": 0, "vision_tokens": 0, "tokens": 0, "token_pairs": 0, "supervised": 0}
    # Two products of 2 FLOPs for each pair and channel in each of two layers; both inputs of a product have gradients.
    tower = step_flops(config, StepWork(**none | {"patch_pairs": 100}), ("projector",))
    assert tower["vision"] == tower["forward"] == 2 * 2 * 2 * 100 * 64
    tower = step_flops(config, StepWork(**none | {"patch_pairs": 100}), ("vision",))
    assert tower["total"] == 3 * tower["forward"]
    decoder = step_flops(config, StepWork(**none | {"token_pairs": 100}))
    assert decoder["llm"] == 3 * 2 * 2 * 2 * 100 * 64
    assert step_flops(config, StepWork(**none | {"supervised": 7}))["unembed"] == 3 * 7 * 2 * 64 * 512
    assert step_flops(config, StepWork(**none | {"supervised": 7}), ("projector",))["unembed"] == 2 * 7 * 2 * 64 * 512


def test_forward_flops_of_the_2b_model():
    """At 16,384 patches and tokens: about 14 TFLOP in the tower and 43 in the linear layers of the decoder."""
    config = preset("2b")
    tower = step_flops(config, StepWork(16_384, 64 * 256**2, 0, 0, 0, 0), ())
    decoder = step_flops(config, StepWork(0, 0, 0, 16_384, 0, 0), ())
    assert 13e12 < tower["forward"] < 15e12
    assert 42e12 < decoder["forward"] < 45e12


def test_a_run_counts_its_trainable_modules():
    batch = long_batch(2)
    forward = StepFlops(MODEL.config, {"vision": None, "projector": 0, "llm": None})(batch)
    stage_1 = StepFlops(MODEL.config, {"vision": 1e-5, "projector": 1e-3, "llm": 0})(batch)
    full = StepFlops(MODEL.config, {"vision": 2e-6, "projector": 1e-5, "llm": 1e-5})(batch)
    assert forward < stage_1 < full <= 3 * forward
    assert StepFlops(MODEL.config, {"all of it": 1e-5})(batch) == full


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("cpu", None),
    ],
)
def test_peak_flops_of_devices(kind, peak):
    assert peak_flops(kind) == peak


def test_flops_equal_the_count_of_the_compiler(monkeypatch):
    """The model has no loops: layers are unrolled, attention and logits dense. Elementwise work is the difference."""

    def unmasked_attention(inputs, **_):
        q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (inputs.q, inputs.k, inputs.v))
        one_segment = SegmentInfo(*(jnp.ones(q.shape[:2], jnp.int32),) * 2)
        rows = inputs.replace(q=q, k=k, v=v, q_info=one_segment, kv_info=one_segment)
        return dense_attention(rows).reshape(inputs.q.shape)

    monkeypatch.setattr(vision, "attention", unmasked_attention)
    monkeypatch.setattr(decoder, "attention", unmasked_attention)
    monkeypatch.setattr(nn, "scan", functools.partial(nn.scan, unroll=True))
    config = preset("mid")
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, num_layers=3),
        text=dataclasses.replace(config.text, num_layers=2),
    )
    model, tokens, patches = VideoLLaMA3(config), 512, 256
    image = random_visual(np.random.default_rng(0), (1, 16, 16), 1)
    sample = random_sample(np.random.default_rng(0), [image], text=(tokens - patches) // 2)
    batch = pack([[sample]], shape_for([[sample]]))

    def loss(params):
        features = encode(model, params, *(batch[name] for name in VISION_KEYS))
        hidden, _ = decode(model, params, batch["tokens"], features, *(batch[name] for name in TEXT_KEYS))
        logits = unembed(model, params, hidden)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).sum()

    # Dense attention also multiplies masked pairs.
    work = StepWork(patches, patches**2, patches, tokens, tokens**2, tokens)
    params = abstract_params(config)
    for function, trainable in ((loss, ()), (jax.grad(loss), ("vision", "projector", "llm"))):
        counted = jax.jit(function).lower(params).cost_analysis()["flops"]
        assert counted == pytest.approx(step_flops(config, work, trainable)["total"], rel=0.02)
