"""Tests ring attention against one device, which slices are computed, and that no device holds whole rows."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from support.attention import (
    cast,
    make_segment_info,
    random_inputs,
    ring_over_arrays,
    stack_rows,
    value_and_gradients,
)
from support.tolerances import REORDERED, relative_error, relative_norm
from vl3_jax.kernels.backend import Backend
from vl3_jax.kernels.blockwise import BLOCKWISE
from vl3_jax.kernels.gpu_attention import gpu_backend
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.model.attention import attention
from vl3_jax.parallel.mesh import make_mesh

LENGTH = 328  # 82 tokens on each of four devices, so that segments cross slices


def packed_rows(rows: int) -> SegmentInfo:
    layouts = [[200, 9, 60], [LENGTH], [], [30] * 8]
    return stack_rows(*(make_segment_info(layouts[i % 4], LENGTH, padding_first=i % 3 == 2) for i in range(rows)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [{"fsdp": 4, "context": 2}, {"fsdp": 2, "context": 4}], ids=str)
def test_ring_equals_one_device(sizes, causal):
    inputs = random_inputs(6, 2, 16, packed_rows(4), causal=causal)
    expected = value_and_gradients(attention, inputs)
    with jax.set_mesh(make_mesh(sizes)):
        ours = value_and_gradients(attention, inputs)
    errors = [relative_error(a, b) for a, b in zip(*map(jax.tree.leaves, (ours, expected)), strict=True)]
    print(f"{sizes}: " + ", ".join(f"{error:.1e}" for error in errors))
    assert 0 < max(errors) <= REORDERED  # not the same program


def test_bfloat16_slices_are_merged_in_float32():
    """Rounding after every slice, five times instead of once, would exceed the bound."""
    inputs = random_inputs(2, 1, 16, make_segment_info([LENGTH], LENGTH), causal=False, dtype=jnp.bfloat16)
    exact = value_and_gradients(attention, cast(inputs, jnp.float32))
    one_device = value_and_gradients(attention, inputs)
    ring = value_and_gradients(ring_over_arrays(BLOCKWISE), inputs)
    for ours, unsplit, reference in zip(*map(jax.tree.leaves, (ring, one_device, exact)), strict=True):
        assert ours.dtype == jnp.bfloat16
        ring_error, unsplit_error = relative_norm(ours, reference), relative_norm(unsplit, reference)
        print(f"{ring_error:.2e} in a ring, {unsplit_error:.2e} on one device")
        assert ring_error <= 1.05 * unsplit_error


def test_any_backend_can_compute_the_slices():
    inputs = random_inputs(2, 1, 16, packed_rows(2), causal=True)
    expected = value_and_gradients(attention, inputs)
    results = value_and_gradients(ring_over_arrays(gpu_backend(interpret=True)), inputs)
    for ours, one_device in zip(*map(jax.tree.leaves, (results, expected)), strict=True):
        assert relative_error(ours, one_device) <= REORDERED


@pytest.mark.parametrize(
    ("layout", "causal", "expected"),
    [
        ([LENGTH // 4] * 4, False, 4),  # each slice is a segment and attends only to itself
        ([LENGTH], True, 10),  # one causal segment: the lower triangle
        ([LENGTH], False, 16),
        ([LENGTH // 2, LENGTH // 4], False, 5),  # two slices share a segment, one has its own, one is padding
    ],
)
def test_slices_without_common_segments_are_skipped(layout, causal, expected):
    calls = []

    def counting(function, name):
        def call(*operands, **options):
            jax.debug.callback(lambda: calls.append(name))
            return function(*operands, **options)

        return call

    local = Backend(counting(BLOCKWISE.forward, "forward"), counting(BLOCKWISE.backward, "backward"))
    inputs = random_inputs(1, 1, 8, make_segment_info(layout, LENGTH), causal=causal)
    jax.block_until_ready(value_and_gradients(ring_over_arrays(local), inputs))
    jax.effects_barrier()
    assert (calls.count("forward"), calls.count("backward")) == (expected, expected)


def test_devices_hold_only_slices():
    mesh = make_mesh({"context": 4, "fsdp": 2})
    inputs = random_inputs(2, 1, 16, packed_rows(2), causal=True)
    inputs = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec("fsdp", "context")))
    with jax.set_mesh(mesh):
        text = value_and_gradients.lower(attention, inputs).compile().as_text()
    sizes = {int(size) for shape in re.findall(r"(?:f32|s32|pred)\[([\d,]+)\]", text) for size in shape.split(",")}
    assert "collective-permute" in text
    assert "all-gather" not in text
    assert LENGTH // 4 in sizes
    assert LENGTH not in sizes
