"""The attention function that the vision tower and the decoder share.

Training, prefill, decoding against a cache and the tower's frames all call it. `vl3_jax.kernels.dispatch` chooses the
implementation: a few queries against many keys are one dense product, or read a cache in place; everything else is
computed block by block.
"""

import functools
from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Int32

from vl3_jax.kernels.backend import AttentionInputs, Backend
from vl3_jax.kernels.dispatch import FEW_QUERIES, decode_attention, local_attention, select_backend
from vl3_jax.kernels.ring import ring_backend
from vl3_jax.parallel.rules import current_mesh, partition_spec


def attention(
    inputs: AttentionInputs,
    *,
    axes: tuple[str | None, ...] = ("batch",),
    backend: Backend | None = None,
    layer: Int32[Array, ""] | None = None,
) -> Float[Array, "*lead L H D"]:
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
            specs, _ = _specs(inputs, axes, mesh, cached=True)
            in_specs = specs, PartitionSpec()  # of the inputs and of the layer
            run = jax.shard_map(decode_attention, in_specs=in_specs, out_specs=specs.q, check_vma=False)
            return run(inputs, layer)
        inputs = inputs.select_layer(layer)
    if mesh is None:
        return _device_attention(inputs, backend)
    specs, ring_axis = _specs(inputs, axes, mesh)
    split_heads = functools.partial(_split_heads, width=inputs.q.shape[-1])

    def attend(inputs: AttentionInputs) -> jax.Array:
        return _merge_heads(_device_attention(_map_heads(split_heads, inputs), backend, ring_axis))

    # Heads enter and leave side by side, as products have them: with dimensions of their own, the compiler would copy
    # them into registers that hold few channels each.
    merged_specs = _map_heads(lambda spec: PartitionSpec(*spec[:-1]), specs)
    run_on_devices = jax.shard_map(attend, in_specs=(merged_specs,), out_specs=merged_specs.q, check_vma=False)
    return split_heads(run_on_devices(_map_heads(_merge_heads, inputs)))


def _map_heads(function: Callable, inputs: AttentionInputs) -> AttentionInputs:
    """Applies a function to queries, keys and values."""
    return inputs.replace(q=function(inputs.q), k=function(inputs.k), v=function(inputs.v))


def _merge_heads(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-2], -1)


def _split_heads(x: jax.Array, width: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], -1, width)


def _specs(
    inputs: AttentionInputs, axes: tuple[str | None, ...], mesh: AbstractMesh, cached: bool = False
) -> tuple[AttentionInputs, str | None]:
    """Returns the partition specs of the operands, and the mesh axis over which keys are split like their queries.

    Queries of `cached` keys are few, and not split; the keys and values are those of all layers.
    """
    q, k = inputs.q, inputs.k
    logical_axes = (*axes, None if cached else "length", "kv_heads")
    *lead, length, heads = partition_spec(logical_axes, (*q.shape[:-2], k.shape[-2]), mesh)
    ring_axis = length if q.shape[-3] == k.shape[-3] else None
    q_info, kv_info = PartitionSpec(*lead, length), PartitionSpec(*lead, ring_axis)
    kv = PartitionSpec(*([None] if cached else []), *kv_info, heads, None)
    q, rotary = PartitionSpec(*q_info, heads, None), None if inputs.rotary is None else PartitionSpec(*q_info, None)
    return inputs.replace(q=q, k=kv, v=kv, q_info=q_info, kv_info=kv_info, rotary=rotary), ring_axis


def _device_attention(inputs: AttentionInputs, backend: Backend | None, ring_axis: str | None = None) -> jax.Array:
    """Computes attention on one device, in a ring with the others along `ring_axis`."""
    lead = inputs.q.ndim - 3  # the backends expect one leading dimension
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[lead:]), inputs)
    if ring_axis:
        backend = ring_backend(backend or select_backend(rows), ring_axis)
    return local_attention(rows, backend).reshape(inputs.q.shape)
