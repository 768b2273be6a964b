"""Training on meshes of eight host devices against one device: equal losses and weights, and a sharded state."""

import functools

import jax
import numpy as np
import pytest
from tiny import Run, distance, optimizer_for, short_batch, split_batch

from support.tolerances import REORDERED
from vl3_jax.parallel.mesh import make_mesh
from vl3_jax.training.groups import flatten

STEPS = 20
# With `context`, a row is split over several devices and attention is ring attention. The last mesh splits vision rows
# over `tensor`, and its microbatches are cut out of split rows: there the compiler computed a wrong gradient of the
# projector until the sharding of the projector's output was constrained.
MESHES = [
    pytest.param({"fsdp": 8}, short_batch, 1, marks=pytest.mark.slow, id="fsdp"),
    pytest.param({"data": 2, "fsdp": 4}, short_batch, 1, marks=pytest.mark.slow, id="data-fsdp"),
    pytest.param({"fsdp": 4, "context": 2}, short_batch, 1, marks=pytest.mark.slow, id="fsdp-context"),
    pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, split_batch, 2, id="data-fsdp-tensor"),
]


@functools.cache
def one_device(batch) -> tuple[list[float], dict]:
    run = Run(optimizer_for(), batch())
    return run.steps(STEPS), jax.device_get(run.state.params)


@functools.cache
def on_mesh(sizes: tuple, batch, grad_accum_steps: int) -> Run:
    mesh = make_mesh(dict(sizes))
    with jax.set_mesh(mesh):
        run = Run(optimizer_for(), batch(), mesh=mesh, grad_accum_steps=grad_accum_steps)
        run.steps(STEPS)
    return run


@pytest.mark.parametrize(("sizes", "batch", "grad_accum_steps"), MESHES)
def test_training_on_a_mesh_equals_training_on_one_device(sizes, batch, grad_accum_steps):
    expected, params = one_device(batch)
    assert expected[-1] <= 0.95 * expected[0]
    run = on_mesh(tuple(sizes.items()), batch, grad_accum_steps)
    losses = [float(metrics["loss"]) for metrics in run.metrics]
    error, weights = np.abs(np.array(losses) / expected - 1).max(), distance(run.state.params, params)
    print(f"{sizes}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, differs by {error:.1e}, the weights by {weights:.1e}")
    assert error <= REORDERED
    assert weights <= REORDERED
    assert all(metrics["finite"] for metrics in run.metrics)


def test_no_parameter_or_moment_is_replicated():
    """The output shardings of the compiled step are split, except for leaves without a dimension that divides."""
    run = on_mesh((("fsdp", 8),), short_batch, 1)
    state, _ = run.compiled.output_shardings
    shapes = flatten(run.state)
    expected = flatten(run.shardings)
    small = []
    for path, sharding in flatten(state).items():
        assert sharding.is_equivalent_to(expected[path], shapes[path].ndim), path
        if path.split("/")[-1] in ("step", "count"):
            continue
        if not any(size % 8 == 0 for size in shapes[path].shape):
            small.append(path)
        else:
            assert not sharding.is_fully_replicated, path
            assert shapes[path].addressable_shards[0].data.size == shapes[path].size // 8, path
    print(f"too small to divide: {', '.join(small) or 'none'}")
    moments = [path for path in expected if "/mu/" in path or "/nu/" in path]
    assert len(moments) == 2 * len(flatten(run.state.params))
