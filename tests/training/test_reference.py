"""Gradients and optimizer steps against transformers and torch, on identical samples and weights."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiny import QUICK, optimizer_for

from support.reference import reference_model, torch
from support.samples import random_sample, random_visual, shape_for
from support.tolerances import PARITY, REORDERED, UPDATE, relative_norm
from vl3_jax.bench.reference import model_inputs, native_params, tensors
from vl3_jax.model import VideoLLaMA3, preset
from vl3_jax.processing.packed_batch import pack
from vl3_jax.training import batch_loss, flatten, make_train_step, new_state

STEPS, RATE = 10, 1e-3
MODULES = ("vision", "projector", "llm")


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for one another make the reference's tiny products a hundred times slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def samples():
    """A picture, text, and a pruned video beside a picture; some of the text is not supervised."""
    rng = np.random.default_rng(3)
    made = [
        random_sample(rng, [random_visual(rng, (1, 4, 6), 1)], text=5),
        random_sample(rng, [], text=12),
        random_sample(rng, [random_visual(rng, (3, 4, 4), 2, still=0.5), random_visual(rng, (1, 4, 4), 2)], text=4),
    ]
    for sample in made:
        sample.loss_weight[:4] = 0
    return made


@functools.cache
def setup(tied: bool):
    config = preset("tiny")
    # Over a few positions the slowest channels of theta 1e6 do not turn: a key's bias then changes nothing, and its
    # gradient is rounding alone, which AdamW would make as large as the others.
    text = dataclasses.replace(config.text, tie_word_embeddings=tied, rope_theta=100.0)
    config = dataclasses.replace(config, text=text)
    reference = reference_model(config)
    # torch trains its tensors in place.
    params = jax.tree.map(np.copy, native_params(tensors(reference), config))
    return config, reference, params


def torch_loss(reference, samples):
    """Cross-entropy of the supervised tokens over their number."""
    logits = reference(**model_inputs(samples), use_cache=False).logits
    losses = []
    for row, sample in enumerate(samples):
        targets = torch.tensor(sample.tokens[1:].astype(np.int64))
        each = torch.nn.functional.cross_entropy(logits[row, : len(targets)], targets, reduction="none")
        losses.append(each * torch.tensor(sample.loss_weight[1:]))
    return torch.cat(losses).sum() / sum(sample.loss_weight[1:].sum() for sample in samples)


def torch_tree(reference, config, values):
    """{parameter: tensor} in our tree."""
    found = {name: values(parameter).numpy() for name, parameter in reference.named_parameters()}
    return native_params(found, config)


def batch_of(samples, packed: bool):
    rows = [samples] if packed else [[sample] for sample in samples]
    return pack(rows, shape_for(rows))


def loss_and_gradients(config, params, *batches):
    """Of each batch; all have one shape."""

    def mean(params, batch):
        sums = batch_loss(VideoLLaMA3(config), params, batch)
        return sums.loss / sums.weight

    run = jax.jit(jax.value_and_grad(mean)).lower(params, batches[0]).compile(compiler_options=QUICK)
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
    """AdamW over three groups, schedule and clipping included; what each parameter went through, not where it is."""
    from transformers import get_cosine_schedule_with_warmup

    config, reference, params = setup(True)
    before = torch_tree(reference, config, lambda parameter: parameter.detach().clone())
    groups = {module: [] for module in MODULES}
    for name, parameter in reference.named_parameters():
        groups[{"vision_model": "vision", "projector": "projector"}.get(name.split(".")[1], "llm")].append(parameter)
    theirs = torch.optim.AdamW([{"params": group} for group in groups.values()], RATE, weight_decay=0.0)
    scheduler = get_cosine_schedule_with_warmup(theirs, 1, 1000)
    for _ in range(STEPS):
        theirs.zero_grad()
        torch_loss(reference, samples()).backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        theirs.step()
        scheduler.step()
    after = torch_tree(reference, config, lambda parameter: parameter.detach())

    optimizer = optimizer_for(params, learning_rates=dict.fromkeys(MODULES, RATE), steps=1000, warmup_ratio=1 / 1000)
    state, batch = jax.jit(functools.partial(new_state, optimizer))(params), batch_of(samples(), True)
    step = make_train_step(VideoLLaMA3(config), optimizer).lower(state, batch).compile(compiler_options=QUICK)
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
    made = samples()
    made[1].loss_weight *= 0.5
    weights = [float(sample.loss_weight[1:].sum()) for sample in made]
    batches = [pack([row], shape_for([made])) for row in (made, *([sample] for sample in made))]
    (loss, gradients), *alone = loss_and_gradients(config, params, *batches)

    def mean(*values):
        return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    assert abs(loss - mean(*(part[0] for part in alone))) <= REORDERED * loss
    errors = jax.tree.map(relative_norm, gradients, jax.tree.map(mean, *(part[1] for part in alone)))
    print(f"packed against alone: largest relative difference of a gradient {max(jax.tree.leaves(errors)):.1e}")
    assert max(jax.tree.leaves(errors)) <= PARITY, errors
