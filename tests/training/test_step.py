"""The train step on one device: gradient accumulation, freezing, metrics, and non-finite values."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    LEARNING_RATES,
    MODEL,
    TASKS,
    Run,
    distance,
    logits,
    optimizer_for,
    run_jitted,
    short_batch,
    start_params,
)

from support.tolerances import BFLOAT16_MOMENT, GRADIENT, REORDERED, relative_error
from vl3_jax.errors import InputError
from vl3_jax.model import VideoLLaMA3, abstract_params
from vl3_jax.training.groups import flatten
from vl3_jax.training.state import new_state
from vl3_jax.training.step import make_eval_step, make_train_step

PARAMS = start_params()
# Settings with which an update is nearly linear in the gradient: no warmup, no clipping, and a large epsilon.
PLAIN = {"warmup_ratio": 0.0, "eps": 1.0, "clip": 0.0}


@functools.cache
def plain_run(grad_accum_steps: int = 1, steps: int = 1) -> Run:
    run = Run(optimizer_for(**PLAIN), short_batch(), grad_accum_steps=grad_accum_steps)
    run.steps(steps)
    return run


def test_losses_equal_those_of_plain_logits():
    batch = short_batch()
    log_softmax = np.asarray(jax.nn.log_softmax(logits(PARAMS, batch)))
    losses = -np.take_along_axis(log_softmax, batch["targets"][..., None], -1)[..., 0]
    weight, metrics = batch["loss_weight"], plain_run().metrics[0]
    assert abs(metrics["loss"] - (losses * weight).sum() / weight.sum()) <= REORDERED * metrics["loss"]
    assert metrics["weight"] == weight.sum()
    assert metrics["supervised_tokens"] == (weight != 0).sum()
    assert metrics["tokens"] == (batch["segment_ids"] > 0).sum()
    task = np.take_along_axis(batch["sample_task"], np.maximum(batch["segment_ids"] - 1, 0), axis=1)
    for number in range(TASKS):
        task_weight = weight * (task == number)
        np.testing.assert_allclose(metrics["task_loss"][number], (losses * task_weight).sum(), rtol=1e-5)
        np.testing.assert_allclose(metrics["task_weight"][number], task_weight.sum(), rtol=1e-6)
    assert (metrics["task_weight"] > 0).all()


def test_metrics_hold_gradient_norm_and_learning_rates():
    first_moments = [leaf for path, leaf in flatten(plain_run().state.opt_state).items() if "/mu/" in path]
    norm = 10 * np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in first_moments))  # 1 - b1 is 0.1
    assert abs(plain_run().metrics[0]["grad_norm"] - norm) <= REORDERED * norm
    assert plain_run().metrics[0]["learning_rates"] == pytest.approx(LEARNING_RATES)
    assert plain_run().state.step == 1


@pytest.mark.parametrize("parts", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_gradient_accumulation_does_not_change_the_step(parts):
    ours, whole = plain_run(parts), plain_run()
    assert abs(ours.metrics[0]["loss"] - whole.metrics[0]["loss"]) <= REORDERED * whole.metrics[0]["loss"]
    np.testing.assert_allclose(ours.metrics[0]["task_loss"], whole.metrics[0]["task_loss"], rtol=REORDERED)
    assert abs(ours.metrics[0]["grad_norm"] / whole.metrics[0]["grad_norm"] - 1) <= REORDERED
    moments = [flatten(run.state.opt_state) for run in (ours, whole)]
    errors = {path: relative_error(moments[0][path], leaf) for path, leaf in moments[1].items() if "/mu/" in path}
    print(f"{parts} microbatches: largest relative difference of a gradient {max(errors.values()):.1e}")
    assert max(errors.values()) <= GRADIENT, errors


def test_grad_accum_steps_must_divide_the_rows():
    step = make_train_step(MODEL, optimizer_for(), grad_accum_steps=3)
    with pytest.raises(InputError, match="8 rows cannot be cut into 3 microbatches"):
        step.lower(jax.eval_shape(functools.partial(new_state, optimizer_for()), PARAMS), short_batch())


QUICK_COMBINATIONS = [("projector",), ("vision", "projector"), ("llm",)]
SLOW_COMBINATIONS = [("vision",), ("vision", "llm"), ("projector", "llm"), ("vision", "projector", "llm")]
COMBINATIONS = QUICK_COMBINATIONS + [pytest.param(groups, marks=pytest.mark.slow) for groups in SLOW_COMBINATIONS]


@pytest.mark.parametrize("trainable", COMBINATIONS, ids=lambda groups: "+".join(groups))
def test_only_frozen_parameters_stay_the_same(trainable):
    """Frozen leaves stay the same bit by bit; every trainable leaf changes."""
    learning_rates = {group: 1e-3 if group in trainable else None for group in LEARNING_RATES}
    run = Run(optimizer_for(learning_rates=learning_rates, warmup_ratio=0.0), short_batch(2))
    run.steps(2)
    assert all(metrics["finite"] for metrics in run.metrics)
    for path, leaf in flatten(run.state.params).items():
        same = np.asarray(leaf).tobytes() == flatten(PARAMS)[path].tobytes()
        assert same == (path.split("/")[0] not in trainable), path
    moment_paths = [path.split("/mu/")[1] for path in flatten(run.state.opt_state) if "/mu/" in path]
    assert {path.split("/")[0] for path in moment_paths} == set(trainable)


def test_a_frozen_tower_runs_forward_only():
    """No scan over the layers of the tower runs backwards if nothing in it or before it is trainable."""
    layers = {"vision": 3, "llm": 2}
    vision = dataclasses.replace(MODEL.config.vision, num_layers=layers["vision"])
    model = VideoLLaMA3(dataclasses.replace(MODEL.config, vision=vision))
    shapes = abstract_params(model.config)

    def backward_scans(**learning_rates):
        optimizer = optimizer_for(shapes, learning_rates=learning_rates)
        state = jax.eval_shape(functools.partial(new_state, optimizer), shapes)
        jaxpr = make_train_step(model, optimizer).trace(state, short_batch(2)).jaxpr
        scans = [eqn for eqn in _equations(jaxpr.jaxpr) if eqn.primitive.name == "scan" and eqn.params["reverse"]]
        return {name: sum(eqn.params["length"] == count for eqn in scans) for name, count in layers.items()}

    assert backward_scans(vision=1e-5, projector=1e-3, llm=0) == {"vision": 1, "llm": 1}
    assert backward_scans(vision=0, projector=1e-3, llm=0) == {"vision": 0, "llm": 1}
    assert backward_scans(vision=0, projector=0, llm=1e-5) == {"vision": 0, "llm": 1}


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from _equations(sub)


def test_a_non_finite_step_keeps_the_state():
    run = Run(optimizer_for(warmup_ratio=0.0), short_batch())
    run.steps(2)
    before = jax.device_get(run.state)
    for name, value in (("loss_weight", np.nan), ("loss_weight", np.inf)):
        batch = dict(run.batch)
        batch[name] = batch[name].copy()
        batch[name][3, np.argmax(batch[name][3])] = value
        run.steps(1, batch)
        assert not run.metrics[-1]["finite"]
        after = jax.device_get(run.state)
        assert all(
            np.asarray(a).tobytes() == np.asarray(b).tobytes()
            for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
        )
    run.steps(1)
    assert run.metrics[-1]["finite"]
    assert run.state.step == 3


def test_a_batch_without_targets_has_a_zero_gradient():
    """The last step of a run may consist of padding rows; its gradient is 0, not NaN."""
    empty = {name: np.zeros_like(array) for name, array in short_batch().items()}
    empty |= {"vision_slot": empty["vision_slot"] - 1, "token_patches": empty["token_patches"] - 1}
    run = Run(optimizer_for(warmup_ratio=0.0), short_batch())
    run.steps(1, empty)
    assert run.metrics[0]["finite"]
    assert run.metrics[0]["loss"] == run.metrics[0]["grad_norm"] == 0
    assert all(np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (run.state.params, PARAMS)), strict=True))


def test_a_first_moment_in_bfloat16():
    changes = []
    for dtype in ("float32", "bfloat16"):
        run = Run(optimizer_for(first_moment_dtype=dtype, warmup_ratio=0.0), short_batch())
        losses = run.steps(10)
        assert losses[-1] < 0.9 * losses[0]
        moments = {leaf.dtype.name for path, leaf in flatten(run.state.opt_state).items() if "/mu/" in path}
        assert moments == {dtype}
        changes.append(jax.tree.map(np.subtract, run.state.params, PARAMS))
    difference = distance(changes[1], changes[0])
    print(f"first moment in bfloat16: the change of all parameters differs by {difference:.1e}")
    assert difference <= BFLOAT16_MOMENT


@pytest.mark.slow
def test_muon_reduces_the_loss():
    run = Run(optimizer_for(kind="muon"), short_batch())
    losses = run.steps(15)
    print(f"Muon: loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    assert losses[-1] < 0.8 * losses[0]


def test_frozen_parameters_in_bfloat16():
    """Activations and frozen parameters are bfloat16, trainable parameters float32."""
    optimizer = optimizer_for(learning_rates={"vision": None, "projector": 1e-3, "llm": None}, warmup_ratio=0.0)
    state = run_jitted(functools.partial(new_state, optimizer, frozen_dtype=jnp.bfloat16), PARAMS)
    types = {path.split("/")[0]: leaf.dtype.name for path, leaf in flatten(state.params).items()}
    assert types == {"vision": "bfloat16", "projector": "float32", "llm": "bfloat16"}
    run = Run(optimizer, short_batch(2), state.params, model=VideoLLaMA3(MODEL.config, jnp.bfloat16))
    losses = run.steps(5)
    assert losses[-1] < losses[0]
    assert {path.split("/")[0]: leaf.dtype.name for path, leaf in flatten(run.state.params).items()} == types


def test_the_evaluation_step_computes_the_loss_of_the_train_step():
    sums = run_jitted(make_eval_step(MODEL, TASKS), PARAMS, short_batch())
    metrics = plain_run().metrics[0]
    assert abs(float(sums.loss / sums.weight) - metrics["loss"]) <= REORDERED * metrics["loss"]
    np.testing.assert_allclose(sums.task_loss, metrics["task_loss"], rtol=REORDERED)


def test_a_text_batch_needs_no_patches():
    batch = {name: array for name, array in short_batch(2).items() if "patch" not in name}
    batch["vision_slot"] = np.full_like(batch["vision_slot"], -1)
    assert np.isfinite(run_jitted(make_eval_step(MODEL), PARAMS, batch).loss)
