"""Tests that a packed batch gives the logits and gradients of its samples, for text and vision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.forward import TEXT_KEYS, VISION_KEYS, forward
from support.samples import random_sample, random_visual, shape_for
from support.tolerances import GRADIENT, REORDERED, relative_error
from support.weights import random_params
from vl3_jax.model import VideoLLaMA3, decode, encode, preset, unembed
from vl3_jax.model.remat import POLICIES
from vl3_jax.processing.packed_batch import pack
from vl3_jax.training.step import batch_loss

MODEL = VideoLLaMA3(preset("tiny"))
PARAMS = random_params(MODEL.config)


@pytest.fixture
def samples():
    rng = np.random.default_rng(3)
    return [
        random_sample(rng, [random_visual(rng, (1, 6, 10), 1)], text=5),
        random_sample(rng, [], text=33),
        random_sample(rng, [random_visual(rng, (4, 4, 6), 2, still=0.5), random_visual(rng, (1, 4, 4), 2)], text=7),
        random_sample(rng, [random_visual(rng, (1, 3, 7), 1)], text=3),
    ]


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(model, params, batch):
    def loss(params):
        features = encode(model, params, *(batch[key] for key in VISION_KEYS))
        hidden, _ = decode(model, params, batch["tokens"], features, *(batch[key] for key in TEXT_KEYS))
        logits = unembed(model, params, hidden)
        target_logits = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]
        return -jnp.sum(target_logits * batch["loss_weight"]), logits

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("vision_rows", [1, 3])
def test_packed_equals_unpacked(samples, vision_rows):
    shape = shape_for([samples], vision_rows)
    if vision_rows > 1:  # short rows, so that the frames use all of them
        shape = dataclasses.replace(shape, patches=96)
    batch = pack([samples], shape)
    assert (batch["patch_segment"] > 0).any(-1).all()
    unpacked = [pack([[sample]], shape_for([samples])) for sample in samples]  # one shape needs one compilation
    (loss, logits), gradients = loss_and_gradients(MODEL, PARAMS, batch)
    parts = [loss_and_gradients(MODEL, PARAMS, single) for single in unpacked]
    for index, (sample, part) in enumerate(zip(samples, parts, strict=True), start=1):
        expected = part[0][1][0, : len(sample.tokens)]
        assert relative_error(logits[0][batch["segment_ids"][0] == index], expected) <= REORDERED
    assert abs(float(loss) - sum(float(part[0][0]) for part in parts)) <= REORDERED * float(loss)
    summed = jax.tree.map(lambda *leaves: sum(leaves), *(part[1] for part in parts))
    errors = jax.tree.map(relative_error, gradients, summed)
    print(f"R = {vision_rows}: largest relative difference of a gradient {max(jax.tree.leaves(errors)):.1e}")
    assert max(jax.tree.leaves(errors)) <= GRADIENT, errors


def test_padding_changes_nothing(samples):
    tight, loose = (pack([samples], shape_for([samples], spare=spare)) for spare in (0, 88))
    length = sum(len(sample.tokens) for sample in samples)
    garbage = dict(loose)
    for key, value in (("tokens", 77), ("positions", 5)):
        garbage[key] = np.where(loose["segment_ids"] == 0, value, loose[key])
    garbage["patches"] = np.where((loose["patch_segment"] == 0)[..., None], 255, loose["patches"])
    expected = forward(MODEL, PARAMS, tight)[0, :length]
    for batch in (loose, garbage):
        assert relative_error(forward(MODEL, PARAMS, batch)[0, :length], expected) <= REORDERED


def test_a_text_batch_has_zero_vision_gradients(samples):
    rows = [[samples[1]]]
    _, gradients = loss_and_gradients(MODEL, PARAMS, pack(rows, shape_for(rows)))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves([gradients["vision"], gradients["projector"]]))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradients["llm"]))


def test_batches_of_one_shape_share_a_trace(samples):
    traces = []

    @jax.jit
    def counted(params, batch):
        traces.append(1)
        features = encode(MODEL, params, *(batch[key] for key in VISION_KEYS))
        return decode(MODEL, params, batch["tokens"], features, *(batch[key] for key in TEXT_KEYS))[0]

    shape = shape_for([samples])
    for rows in ([samples], [samples[:2]], [samples[2:]], [[]]):
        counted(PARAMS, pack(rows, shape))
    assert len(traces) == 1


def test_a_vision_token_may_be_inserted_repeatedly(samples):
    """Positions with the same vision slot get the same features, so a repeated image is encoded only once."""
    rng = np.random.default_rng(4)
    image = random_visual(rng, (1, 4, 6), 2)
    sample = random_sample(rng, [image, image])
    batch = pack([[sample]], shape_for([[sample]]))
    shared = dict(batch)
    shared["vision_slot"] = np.where(batch["vision_slot"] >= 6, batch["vision_slot"] - 6, batch["vision_slot"])
    assert shared["vision_slot"].max() == 5
    expected = forward(MODEL, PARAMS, batch)
    assert relative_error(forward(MODEL, PARAMS, shared), expected) <= REORDERED


def test_what_each_policy_multiplies_again(samples):
    """Products of the forward pass that the backward pass repeats, in a layer of the tower and one of the decoder."""
    batch = pack([samples], shape_for([samples]))

    def products(policy):
        model = VideoLLaMA3(MODEL.config, vision_remat=policy, text_remat=policy)
        trace = jax.make_jaxpr(jax.grad(lambda params: batch_loss(model, params, batch).loss))(PARAMS)
        return str(trace).count("dot_general")

    repeated = {policy: products(policy) - products("none") for policy in POLICIES}
    projections = 5 + 6  # of tower and decoder, all but that out of the MLP, whose result no gradient needs
    assert repeated == {"none": 0, "dots": 0, "outputs": projections, "full": projections + 2 * 2}  # 2 of attention


@pytest.mark.parametrize(
    "policy", [pytest.param(name, marks=[pytest.mark.slow] * (name != "full")) for name in POLICIES if name != "none"]
)
def test_rematerialisation_keeps_the_gradients(samples, policy):
    batch = pack([samples], shape_for([samples]))
    model = VideoLLaMA3(MODEL.config, vision_remat=policy, text_remat=policy)
    (loss, _), gradients = loss_and_gradients(model, PARAMS, batch)
    (expected_loss, _), expected = loss_and_gradients(MODEL, PARAMS, batch)
    assert abs(loss - expected_loss) <= REORDERED * expected_loss
    assert max(jax.tree.leaves(jax.tree.map(relative_error, gradients, expected))) <= GRADIENT
