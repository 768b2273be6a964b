"""The model's one attention function.

Training, prefill, decoding against a cache, and the tower's frames are all calls of it. What it runs on is chosen in
`vl3_jax.kernels.dispatch`: a few queries against many keys are one dense product, or read a cache in place; everything
else goes in blocks.
"""

import functools

import jax
from jax.sharding import PartitionSpec

from vl3_jax.kernels.backend import Backend
from vl3_jax.kernels.dispatch import FEW_QUERIES, decode_attention, local_attention, select_backend
from vl3_jax.kernels.ring import ring_attention
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.parallel.rules import current_mesh, partition_spec


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segment: jax.Array,
    kv_segment: jax.Array,
    q_position: jax.Array | None = None,
    kv_position: jax.Array | None = None,
    *,
    causal: bool,
    axes: tuple[str | None, ...] = ("batch",),
    backend: Backend | None = None,
    layer: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v, where a query sees the keys of its own segment.

    Args:
      q: [*lead, L, H, D]; k, v: [*lead, S, K, D], where K divides H (grouped queries).
      q_segment, kv_segment: [*lead, L], [*lead, S] int32; segment 0 attends to nothing and gives zeros.
      q_position, kv_position: the same shapes; needed when `causal`.
      causal: a query sees only keys whose position is not later than its own.
      axes: logical axes of the leading dimensions; heads split over `tensor` where both H and K divide, and queries
        over `context`: with their keys, which then go round, where L = S, else alone.
      backend: instead of the one for these shapes on this platform.
      layer: [] int32; then k and v are the caches of all layers, [layers, B, S, K, D] of any type, of which this one
        is meant. A few queries read it in place, and only the slots in use.

    Returns:
      [*lead, L, H, D] in the type of q.
    """
    if causal and (q_position is None or kv_position is None):
        raise ValueError("causal attention needs the positions of queries and keys")
    q_position = q_segment if q_position is None else q_position
    kv_position = kv_segment if kv_position is None else kv_position
    labels = (q_segment, kv_segment, q_position, kv_position)
    if layer is not None:
        if backend is None and q.shape[-3] <= FEW_QUERIES:
            return _decode(q, k, v, layer, *labels, causal=causal, axes=axes)
        k, v = (x[layer].astype(q.dtype) for x in (k, v))
    operands = (q, k, v, *labels)

    mesh = current_mesh()
    if mesh is None:
        return _on_one_device(*operands, causal=causal, backend=backend)
    specs, ring = _operand_specs(q, k, axes, mesh)
    local = functools.partial(_in_a_ring, axis=ring) if ring else _on_one_device
    local = functools.partial(local, causal=causal, backend=backend)
    return jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)(*operands)


def _decode(q, keys, values, layer, *labels, causal, axes):
    def local(q, keys, values, layer, *labels):
        labels = SegmentInfo(*labels[::2]), SegmentInfo(*labels[1::2])
        return decode_attention(q, keys, values, layer, *labels, causal=causal, scale=q.shape[-1] ** -0.5)

    mesh = current_mesh()
    if mesh is None:
        return local(q, keys, values, layer, *labels)
    rows, _, heads, _ = partition_spec((*axes, None, "kv_heads", None), keys.shape[1:], mesh)
    q_spec, cache_spec = PartitionSpec(rows, None, heads, None), PartitionSpec(None, rows, None, heads, None)
    specs = (q_spec, cache_spec, cache_spec, PartitionSpec(), *[PartitionSpec(rows, None)] * 4)
    return jax.shard_map(local, in_specs=specs, out_specs=q_spec, check_vma=False)(q, keys, values, layer, *labels)


def _operand_specs(
    q: jax.Array, k: jax.Array, axes: tuple[str | None, ...], mesh
) -> tuple[tuple[PartitionSpec, ...], str | None]:
    """How the operands are split, and the mesh axis along which keys are split like their queries."""
    lead = tuple(partition_spec(axes, q.shape[:-3], mesh))
    length = partition_spec(("length",), q.shape[-3:-2], mesh)[0]
    taken = {name for entry in lead if entry for name in ([entry] if isinstance(entry, str) else entry)}
    length = None if length in taken else length
    heads = partition_spec(("kv_heads",), k.shape[-2:-1], mesh)[0]
    heads = None if heads in taken else heads
    ring = length if q.shape[-3] == k.shape[-3] else None
    q_spec, kv_spec = PartitionSpec(*lead, length, heads, None), PartitionSpec(*lead, ring, heads, None)
    q_info, kv_info = PartitionSpec(*lead, length), PartitionSpec(*lead, ring)
    return (q_spec, kv_spec, kv_spec, q_info, kv_info, q_info, kv_info), ring


def _in_a_ring(*operands, causal, backend, axis):
    shape = operands[0].shape
    operands = _flat_rows(*operands)
    backend = backend or select_backend(*operands[:3], causal)
    return ring_attention(*operands, causal=causal, scale=shape[-1] ** -0.5, axis=axis, local=backend).reshape(shape)


def _on_one_device(*operands, causal, backend):
    shape = operands[0].shape
    operands = _flat_rows(*operands)
    return local_attention(*operands, causal=causal, scale=shape[-1] ** -0.5, backend=backend).reshape(shape)


def _flat_rows(q, k, v, q_segment, kv_segment, q_position, kv_position):
    """The operands of a backend: all leading dimensions in one."""
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    labels = [x.reshape(-1, x.shape[-1]) for x in (q_segment, q_position, kv_segment, kv_position)]
    return q, k, v, SegmentInfo(*labels[:2]), SegmentInfo(*labels[2:])
