"""The attention function that the vision tower and the decoder share.

Training, prefill, decoding against a cache and the tower's frames all call it. `vl3_jax.kernels.dispatch` chooses the
implementation: a few queries against many keys are one dense product, or read a cache in place; everything else is
computed block by block.
"""

import functools

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from vl3_jax.kernels.backend import AttentionInputs, Backend
from vl3_jax.kernels.dispatch import FEW_QUERIES, decode_attention, local_attention, select_backend
from vl3_jax.kernels.ring import ring_backend
from vl3_jax.parallel.rules import current_mesh, partition_spec


def attention(
    inputs: AttentionInputs,
    *,
    axes: tuple[str | None, ...] = ("batch",),
    backend: Backend | None = None,
    layer: jax.Array | None = None,
) -> jax.Array:
    """Computes softmax(scale * q k^T) v, where a query attends to the keys of its own segment.

    Args:
      inputs: Operands of attention, which may have several leading dimensions instead of B.
      axes: Logical axes of the leading dimensions. Heads are split over the mesh axis `tensor` where it divides both H
        and K, and queries over `context`. Where L = S the keys are split over `context` too, and rotate in a ring.
      backend: Implementation to use instead of the default for these shapes on this platform.
      layer: Index of a decoder layer, [] int32. With it, `k` and `v` are the caches of all layers,
        [layers, B, S, K, D] of any dtype. A few queries read this layer in place, and only the slots in use.

    Returns:
      The attention output, [*lead, L, H, D] in the dtype of `q`.
    """
    mesh = current_mesh()
    if layer is not None:
        if backend is None and inputs.q.shape[-3] <= FEW_QUERIES:
            if mesh is None:
                return decode_attention(inputs, layer)
            specs = _cache_specs(inputs, axes, mesh), PartitionSpec()
            run = jax.shard_map(decode_attention, in_specs=specs, out_specs=specs[0].q, check_vma=False)
            return run(inputs, layer)
        inputs = inputs.select_layer(layer)
    if mesh is None:
        return _device_attention(inputs, backend)
    specs, ring_axis = _specs(inputs, axes, mesh)
    run = functools.partial(_device_attention, backend=backend, ring_axis=ring_axis)
    return jax.shard_map(run, in_specs=(specs,), out_specs=specs.q, check_vma=False)(inputs)


def _cache_specs(inputs: AttentionInputs, axes: tuple[str | None, ...], mesh: AbstractMesh) -> AttentionInputs:
    """Returns the partition specs of a few queries, and of the caches of all layers that they attend to."""
    rows, _, heads, _ = partition_spec((*axes, None, "kv_heads", None), inputs.k.shape[1:], mesh)
    info, cache = PartitionSpec(rows, None), PartitionSpec(None, rows, None, heads, None)
    return inputs.replace(q=PartitionSpec(rows, None, heads, None), k=cache, v=cache, q_info=info, kv_info=info)


def _specs(
    inputs: AttentionInputs, axes: tuple[str | None, ...], mesh: AbstractMesh
) -> tuple[AttentionInputs, str | None]:
    """Returns the partition specs of the operands, and the mesh axis over which keys are split like their queries."""
    q, k = inputs.q, inputs.k
    lead = tuple(partition_spec(axes, q.shape[:-3], mesh))
    length = partition_spec(("length",), q.shape[-3:-2], mesh)[0]
    taken = {name for entry in lead if entry for name in ([entry] if isinstance(entry, str) else entry)}
    length = None if length in taken else length
    heads = partition_spec(("kv_heads",), k.shape[-2:-1], mesh)[0]
    heads = None if heads in taken else heads
    ring_axis = length if q.shape[-3] == k.shape[-3] else None
    q_spec, kv_spec = PartitionSpec(*lead, length, heads, None), PartitionSpec(*lead, ring_axis, heads, None)
    q_info, kv_info = PartitionSpec(*lead, length), PartitionSpec(*lead, ring_axis)
    return inputs.replace(q=q_spec, k=kv_spec, v=kv_spec, q_info=q_info, kv_info=kv_info), ring_axis


def _device_attention(inputs: AttentionInputs, backend: Backend | None, ring_axis: str | None = None) -> jax.Array:
    """Computes attention on one device, in a ring with the others along `ring_axis`."""
    lead = inputs.q.ndim - 3  # the backends expect one leading dimension
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[lead:]), inputs)
    if ring_axis:
        backend = ring_backend(backend or select_backend(rows), ring_axis)
    return local_attention(rows, backend).reshape(inputs.q.shape)
