"""Attention over positions that several devices share, against one device; who works, and what no device ever holds."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from support.attention import labels_of, random_qkv, value_and_gradients
from support.tolerances import REORDERED, relative_error, relative_norm
from vl3_jax.kernels.backend import Backend
from vl3_jax.kernels.blockwise import BLOCKWISE
from vl3_jax.kernels.gpu_attention import gpu_backend
from vl3_jax.kernels.ring import ring_attention
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.model.attention import attention
from vl3_jax.parallel.mesh import make_mesh

LENGTH = 328  # of four devices, 82 each: segments cross their borders
SPLIT = PartitionSpec(None, "context")


def packed_rows(rows: int) -> SegmentInfo:
    layouts = [[200, 9, 60], [LENGTH], [], [30] * 8]
    labels = [labels_of(layouts[i % 4], LENGTH, padding_first=i % 3 == 2) for i in range(rows)]
    return SegmentInfo(*(np.concatenate(x) for x in zip(*labels, strict=True)))


def through_attention(q, k, v, q_info, kv_info, *, causal, scale):
    segments, positions = zip(q_info, kv_info, strict=True)
    return attention(q, k, v, *segments, *positions, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [{"fsdp": 4, "context": 2}, {"fsdp": 2, "context": 4}], ids=str)
def test_a_ring_equals_one_device(sizes, causal):
    labels, qkv = packed_rows(4), random_qkv(4, LENGTH, LENGTH, 6, 2, 16)
    expected = value_and_gradients(through_attention, *qkv, labels, labels, causal)
    with jax.set_mesh(make_mesh(sizes)):
        found = value_and_gradients(through_attention, *qkv, labels, labels, causal)
    errors = [relative_error(a, b) for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True)]
    print(f"{sizes}: " + ", ".join(f"{error:.1e}" for error in errors))
    assert 0 < max(errors) <= REORDERED  # not the same program


def in_a_ring(local, devices=4):
    """`ring_attention` over whole arrays."""
    mesh = make_mesh({"context": devices}, jax.devices()[:devices])

    def whole(q, k, v, q_info, kv_info, *, causal, scale):
        split = functools.partial(ring_attention, causal=causal, scale=scale, axis="context", local=local)
        labels = SegmentInfo(SPLIT, SPLIT)
        specs = (SPLIT, SPLIT, SPLIT, labels, labels)
        return jax.shard_map(split, mesh=mesh, in_specs=specs, out_specs=SPLIT, check_vma=False)(
            q, k, v, q_info, kv_info
        )

    return whole


def test_bfloat16_is_merged_in_float32():
    """Five roundings instead of one would show."""
    labels, qkv = labels_of([LENGTH], LENGTH), random_qkv(1, LENGTH, LENGTH, 2, 1, 16)
    low = [x.astype(jnp.bfloat16) for x in qkv]
    exact = value_and_gradients(through_attention, *(x.astype(jnp.float32) for x in low), labels, labels, False)
    one_device = value_and_gradients(through_attention, *low, labels, labels, False)
    ring = value_and_gradients(in_a_ring(BLOCKWISE), *low, labels, labels, False)
    for ours, theirs, truth in zip(*map(jax.tree.leaves, (ring, one_device, exact)), strict=True):
        assert ours.dtype == jnp.bfloat16
        error, unsplit = relative_norm(ours, truth), relative_norm(theirs, truth)
        print(f"{error:.2e} in a ring, {unsplit:.2e} on one device")
        assert error <= 1.05 * unsplit


def test_any_backend_can_be_the_local_one():
    labels, qkv = packed_rows(2), random_qkv(2, LENGTH, LENGTH, 2, 1, 16)
    expected = value_and_gradients(through_attention, *qkv, labels, labels, True)
    found = value_and_gradients(in_a_ring(gpu_backend(interpret=True)), *qkv, labels, labels, True)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert relative_error(ours, theirs) <= REORDERED


@pytest.mark.parametrize(
    ("layout", "causal", "expected"),
    [
        ([LENGTH // 4] * 4, False, 4),  # each slice a segment: only its own
        ([LENGTH], True, 10),  # one causal segment: the lower triangle
        ([LENGTH], False, 16),
        ([LENGTH // 2, LENGTH // 4], False, 5),  # two slices that share one segment, one alone, one of padding
    ],
)
def test_slices_that_share_nothing_cost_no_work(layout, causal, expected):
    calls = []

    def counted(function, name):
        def call(*operands, **options):
            jax.debug.callback(lambda: calls.append(name))
            return function(*operands, **options)

        return call

    local = Backend(counted(BLOCKWISE.forward, "forward"), counted(BLOCKWISE.backward, "backward"))
    labels, qkv = labels_of(layout, LENGTH), random_qkv(1, LENGTH, LENGTH, 1, 1, 8)
    jax.block_until_ready(value_and_gradients(in_a_ring(local), *qkv, labels, labels, causal))
    jax.effects_barrier()
    assert (calls.count("forward"), calls.count("backward")) == (expected, expected)


def test_no_device_holds_more_than_slices():
    mesh = make_mesh({"context": 4, "fsdp": 2})
    labels, qkv = packed_rows(2), random_qkv(2, LENGTH, LENGTH, 2, 1, 16)
    placed = jax.device_put((qkv, labels), NamedSharding(mesh, PartitionSpec("fsdp", "context")))
    with jax.set_mesh(mesh):
        text = value_and_gradients.lower(through_attention, *placed[0], placed[1], placed[1], True).compile().as_text()
    sizes = {int(size) for shape in re.findall(r"(?:f32|s32|pred)\[([\d,]+)\]", text) for size in shape.split(",")}
    assert "collective-permute" in text
    assert "all-gather" not in text
    assert LENGTH // 4 in sizes
    assert LENGTH not in sizes
