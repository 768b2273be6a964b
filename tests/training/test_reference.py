"""Gradients and optimizer steps against transformers and torch, with identical samples and weights."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny import FAST_COMPILE, optimizer_for

from support.samples import random_sample, random_visual, shape_for
from support.tolerances import PARITY, REORDERED, UPDATE, relative_norm
from vl3_jax.model import VideoLLaMA3, preset
from vl3_jax.processing.packed_batch import pack
from vl3_jax.training.groups import flatten
from vl3_jax.training.state import new_state
from vl3_jax.training.step import batch_loss, make_train_step

pytest.importorskip("support.reference", reason="the reference is not installed: pip install -e '.[parity]'")
from support.reference import model_inputs, native_params, reference_model, tensors, torch

STEPS, LEARNING_RATE = 10, 1e-3
MODULES = ("vision", "projector", "llm")


@pytest.fixture(autouse=True)
def one_thread():
    """Runs torch in one thread: on a busy machine, synchronisation makes its tiny products a hundred times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def samples():
    """Returns an image, text, and a pruned video with an image; some of the text is not supervised."""
    rng = np.random.default_rng(3)
    generated = [
        random_sample(rng, [random_visual(rng, (1, 4, 6), 1)], text=5),
        random_sample(rng, [], text=12),
        random_sample(rng, [random_visual(rng, (3, 4, 4), 2, still=0.5), random_visual(rng, (1, 4, 4), 2)], text=4),
    ]
    for sample in generated:
        sample.loss_weight[:4] = 0
    return generated


@functools.cache
def setup(tied: bool):
    config = preset("tiny")
    # Over a few positions the slowest channels of theta 1e6 hardly rotate: the bias of a key has no effect there, and
    # its gradient is only rounding error, which AdamW would normalise to the size of the others.
    text = dataclasses.replace(config.text, tie_word_embeddings=tied, rope_theta=100.0)
    config = dataclasses.replace(config, text=text)
    reference = reference_model(config)
    # torch updates its tensors in place.
    params = jax.tree.map(np.copy, native_params(tensors(reference), config))
    return config, reference, params


def torch_loss(reference, samples):
    """Returns the weighted mean of the cross-entropy over supervised tokens."""
    logits = reference(**model_inputs(samples), use_cache=False).logits
    losses = []
    for row, sample in enumerate(samples):
        targets = torch.tensor(sample.tokens[1:].astype(np.int64))
        token_losses = torch.nn.functional.cross_entropy(logits[row, : len(targets)], targets, reduction="none")
        losses.append(token_losses * torch.tensor(sample.loss_weight[1:]))
    return torch.cat(losses).sum() / sum(sample.loss_weight[1:].sum() for sample in samples)


def torch_tree(reference, config, values):
    """Returns `values(parameter)` of all parameters of the reference as a tree like that of `VideoLLaMA3`."""
    by_name = {name: values(parameter).numpy() for name, parameter in reference.named_parameters()}
    return native_params(by_name, config)


def batch_of(samples, packed: bool):
    rows = [samples] if packed else [[sample] for sample in samples]
    return pack(rows, shape_for(rows))


def loss_and_gradients(config, params, *batches):
    """Returns mean loss and gradients of each batch; all batches have the same shape."""

    def mean(params, batch):
        sums = batch_loss(VideoLLaMA3(config), params, batch)
        return sums.loss / sums.weight

    run = jax.jit(jax.value_and_grad(mean)).lower(params, batches[0]).compile(compiler_options=FAST_COMPILE)
    return [run(params, batch) for batch in batches]


@pytest.mark.parametrize(("tied", "packed"), [(True, True), (False, False)])
def test_gradients_equal_the_reference(tied, packed):
    config, reference, params = setup(tied)
    ((loss, gradients),) = loss_and_gradients(config, params, batch_of(samples(), packed))
    reference.zero_grad()
    expected_loss = torch_loss(reference, samples())
    expected_loss.backward()
    expected = torch_tree(reference, config, lambda parameter: parameter.grad)
    errors = flatten(jax.tree.map(relative_norm, gradients, expected))
    worst = max(errors, key=errors.get)
    difference = abs(float(loss) / expected_loss.item() - 1)
    print(f"tied {tied}, packed {packed}: loss {difference:.1e}, largest of a gradient {errors[worst]:.1e} ({worst})")
    assert difference <= REORDERED
    assert errors[worst] <= PARITY, errors


def test_ten_steps_equal_the_reference():
    """Compares the change of each parameter under AdamW with three groups, schedule and clipping."""
    from transformers import get_cosine_schedule_with_warmup

    config, reference, params = setup(True)
    before = torch_tree(reference, config, lambda parameter: parameter.detach().clone())
    groups = {module: [] for module in MODULES}
    for name, parameter in reference.named_parameters():
        groups[{"vision_model": "vision", "projector": "projector"}.get(name.split(".")[1], "llm")].append(parameter)
    torch_optimizer = torch.optim.AdamW(
        [{"params": group} for group in groups.values()], LEARNING_RATE, weight_decay=0.0
    )
    scheduler = get_cosine_schedule_with_warmup(torch_optimizer, 1, 1000)
    for _ in range(STEPS):
        torch_optimizer.zero_grad()
        torch_loss(reference, samples()).backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        torch_optimizer.step()
        scheduler.step()
    after = torch_tree(reference, config, lambda parameter: parameter.detach())

    optimizer = optimizer_for(
        params, learning_rates=dict.fromkeys(MODULES, LEARNING_RATE), steps=1000, warmup_ratio=1 / 1000
    )
    state, batch = jax.jit(functools.partial(new_state, optimizer))(params), batch_of(samples(), True)
    step = make_train_step(VideoLLaMA3(config), optimizer).lower(state, batch).compile(compiler_options=FAST_COMPILE)
    for _ in range(STEPS):
        state, metrics = step(state, batch)
    change = jax.tree.map(np.subtract, state.params, params)
    expected = jax.tree.map(np.subtract, after, before)
    errors = flatten(jax.tree.map(relative_norm, change, expected))
    worst = max(errors, key=errors.get)
    print(f"after {STEPS} steps: largest relative difference of a change {errors[worst]:.1e} ({worst})")
    assert abs(float(metrics["grad_norm"]) / float(norm) - 1) <= 1e-3
    assert errors[worst] <= UPDATE, errors


def test_a_packed_batch_is_the_weighted_mean_of_its_samples():
    config, _, params = setup(True)
    row = samples()
    row[1].loss_weight *= 0.5
    weights = [float(sample.loss_weight[1:].sum()) for sample in row]
    batches = [pack([members], shape_for([row])) for members in (row, *([sample] for sample in row))]
    (loss, gradients), *separate = loss_and_gradients(config, params, *batches)

    def mean(*values):
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    assert abs(loss - mean(*(value for value, _ in separate))) <= REORDERED * loss
    errors = jax.tree.map(relative_norm, gradients, jax.tree.map(mean, *(gradient for _, gradient in separate)))
    print(
        f"packed against separate samples: largest relative difference of a gradient {max(jax.tree.leaves(errors)):.1e}"
    )
    assert max(jax.tree.leaves(errors)) <= PARITY, errors
