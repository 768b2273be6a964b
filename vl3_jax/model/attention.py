"""The attention function that the vision tower and the decoder share, and attention to a cache.

Training, prefill, decoding against a cache and the tower's frames all call it. `vl3_jax.kernels.dispatch` chooses the
implementation: a few queries against many keys are one dense product, or read a cache in place; everything else is
computed block by block.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from vl3_jax.kernels.backend import AttentionInputs, Backend
from vl3_jax.kernels.decode_inputs import DecodeInputs, DecodeOutputs, DecodeSchedule, flat, split_heads
from vl3_jax.kernels.dispatch import (
    decode_attention,
    decode_schedule_for,
    local_attention,
    most_decode_queries,
    select_backend,
)
from vl3_jax.kernels.keys_values import KeysValues
from vl3_jax.kernels.ring import ring_backend
from vl3_jax.kernels.rotary import rotate
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.parallel.rules import current_mesh, partition_spec


def cached_attention(
    qkv: Float[Array, "B L N"],
    rotary: Float32[Array, "B L head_dim"],
    infos: tuple[SegmentInfo, SegmentInfo],
    cached: KeysValues,
    layer: Int32[Array, ""],
    rows: Int32[Array, " B"] | None,
    schedule: DecodeSchedule | None,
) -> DecodeOutputs:
    """Computes causal attention of new tokens to themselves and to one layer of a cache.

    Args:
      qkv: Queries, keys and values of the new tokens, see `DecodeInputs`.
      rotary: Their rotary table, [B, L, head_dim].
      infos: Segments and positions of the new tokens, [B, L], and of the slots of their rows, [B, S], into which they
        are not yet written.
      cached: Keys and values of all layers.
      layer: Index of the layer, [] int32.
      rows: Row of the cache of each row of queries, [B] int32; None where they are the same.
      schedule: From `cache_schedule`. With one, the layer is read in place, and only the slots in use.

    Returns:
      The attention output, and the keys and values that are to be written.
    """
    mesh, scale = current_mesh(), cached.keys.shape[4] ** -0.5
    if schedule is None:
        return _long_cached_attention(qkv, rotary, infos, cached, layer, rows, scale)
    inputs = DecodeInputs(qkv, rotary, cached, layer, rows, schedule, scale=scale)
    if mesh is None:
        return decode_attention(inputs)
    batch, heads = partition_spec(("batch", "kv_heads"), (qkv.shape[0], cached.keys.shape[2]), mesh)
    row_spec, head_spec = PartitionSpec(batch), PartitionSpec(batch, None, heads)
    specs = inputs.replace(
        qkv=head_spec,
        rotary=row_spec,
        keys_values=PartitionSpec(None, batch, heads),
        layer=PartitionSpec(),
        schedule=row_spec,
    )
    return jax.shard_map(decode_attention, in_specs=(specs,), out_specs=head_spec, check_vma=False)(inputs)


def _long_cached_attention(qkv, rotary, infos, cached, layer, rows, scale) -> DecodeOutputs:
    """Computes `cached_attention` of many tokens, over a copy of the layer."""
    kv_heads, width = cached.keys.shape[2], cached.keys.shape[4]
    q, k, v = split_heads(qkv, kv_heads, qkv.shape[2] // (kv_heads * width) - 2, width)
    q, k = rotate(q, rotary), rotate(k, rotary)
    old = (x.swapaxes(1, 2) for x in cached.read(layer, rows, q.dtype))
    keys, values = (jnp.concatenate(pair, axis=1) for pair in zip(old, (k, v), strict=True))
    kv_info = SegmentInfo(*(jnp.concatenate(pair, axis=1) for pair in zip(infos[1], infos[0], strict=True)))
    out = attention(AttentionInputs(q, keys, values, infos[0], kv_info, causal=True, scale=scale))
    return DecodeOutputs(flat(out), flat(k, v))


def cache_schedule(
    q_info: SegmentInfo, kv_info: SegmentInfo, cached: KeysValues, rows: Int32[Array, " B"] | None
) -> DecodeSchedule | None:
    """Returns what all layers share of attention of a few queries to a cache; None of many queries.

    On a mesh, which may split the rows of a cache, it is also None of queries of other rows than the cache has.
    """
    if q_info.segment_ids.shape[1] > most_decode_queries(cached) or (rows is not None and current_mesh() is not None):
        return None
    return decode_schedule_for(q_info, kv_info, cached)


def attention(
    inputs: AttentionInputs, *, axes: tuple[str | None, ...] = ("batch",), backend: Backend | None = None
) -> Float[Array, "*lead L H D"]:
    """Computes softmax(scale * q k^T) v, where a query attends to the keys of its own segment.

    Args:
      inputs: Operands of attention, which may have several leading dimensions instead of B.
      axes: Logical axes of the leading dimensions. Heads are split over the mesh axis `tensor` where it divides both H
        and K, and queries over `context`. Where L = S the keys are split over `context` too, and rotate in a ring.
      backend: Implementation to use instead of the default for these shapes on this platform.

    Returns:
      The attention output, [*lead, L, H, D] in the dtype of `q`.
    """
    mesh = current_mesh()
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
    inputs: AttentionInputs, axes: tuple[str | None, ...], mesh: AbstractMesh
) -> tuple[AttentionInputs, str | None]:
    """Returns the partition specs of the operands, and the mesh axis over which keys are split like their queries."""
    q, k = inputs.q, inputs.k
    *lead, length, heads = partition_spec((*axes, "length", "kv_heads"), (*q.shape[:-2], k.shape[-2]), mesh)
    ring_axis = length if q.shape[-3] == k.shape[-3] else None
    q_info, kv_info = PartitionSpec(*lead, length), PartitionSpec(*lead, ring_axis)
    kv = PartitionSpec(*kv_info, heads, None)
    q, rotary = PartitionSpec(*q_info, heads, None), None if inputs.rotary is None else PartitionSpec(*q_info, None)
    return inputs.replace(q=q, k=kv, v=kv, q_info=q_info, kv_info=kv_info, rotary=rotary), ring_axis


def _device_attention(inputs: AttentionInputs, backend: Backend | None, ring_axis: str | None = None) -> jax.Array:
    """Computes attention on one device, in a ring with the others along `ring_axis`."""
    lead = inputs.q.ndim - 3  # the backends expect one leading dimension
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[lead:]), inputs)
    if ring_axis:
        backend = ring_backend(backend or select_backend(rows), ring_axis)
    return local_attention(rows, backend).reshape(inputs.q.shape)
