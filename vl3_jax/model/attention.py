"""The attention function that the vision tower and the decoder share.

Training, prefill, decoding against a cache and the tower's frames all call it. `vl3_jax.kernels.dispatch` chooses the
implementation: a few queries against many keys are one dense product, or read a cache in place; everything else is
computed block by block.
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
    """Computes softmax(q k^T / sqrt(D)) v, where a query attends to the keys of its own segment.

    Args:
      q: Queries, [*lead, L, H, D].
      k: Keys, [*lead, S, K, D], where K divides H (grouped-query attention).
      v: Values, of the same shape as `k`.
      q_segment: Segment of each query, [*lead, L] int32; a query of segment 0 attends to nothing and gives zeros.
      kv_segment: Segment of each key, [*lead, S] int32; nothing attends to a key of segment 0.
      q_position: Position of each query, [*lead, L] int32; required when `causal`.
      kv_position: Position of each key, [*lead, S] int32; required when `causal`.
      causal: Whether a query attends only to keys whose position is not later than its own.
      axes: Logical axes of the leading dimensions. Heads are split over the mesh axis `tensor` where it divides both H
        and K, and queries over `context`. Where L = S the keys are split over `context` too, and rotate in a ring.
      backend: Implementation to use instead of the default for these shapes on this platform.
      layer: Index of a decoder layer, [] int32. With it, `k` and `v` are the caches of all layers,
        [layers, B, S, K, D] of any dtype. A few queries read this layer in place, and only the slots in use.

    Returns:
      The attention output, [*lead, L, H, D] in the dtype of `q`.

    Raises:
      ValueError: Positions are missing although `causal`.
    """
    if causal and (q_position is None or kv_position is None):
        raise ValueError("causal attention needs the positions of queries and keys")
    q_position = q_segment if q_position is None else q_position
    kv_position = kv_segment if kv_position is None else kv_position
    info = (q_segment, kv_segment, q_position, kv_position)
    if layer is not None:
        if backend is None and q.shape[-3] <= FEW_QUERIES:
            return _decode(q, k, v, layer, *info, causal=causal, axes=axes)
        k, v = (x[layer].astype(q.dtype) for x in (k, v))
    operands = (q, k, v, *info)

    mesh = current_mesh()
    if mesh is None:
        return _local_attention(*operands, causal=causal, backend=backend)
    specs, ring_axis = _operand_specs(q, k, axes, mesh)
    local = functools.partial(_ring_attention, axis=ring_axis) if ring_axis else _local_attention
    local = functools.partial(local, causal=causal, backend=backend)
    return jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)(*operands)


def _decode(q, keys, values, layer, *info, causal, axes):
    def local(q, keys, values, layer, *info):
        q_info, kv_info = SegmentInfo(*info[::2]), SegmentInfo(*info[1::2])
        return decode_attention(q, keys, values, layer, q_info, kv_info, causal=causal, scale=q.shape[-1] ** -0.5)

    mesh = current_mesh()
    if mesh is None:
        return local(q, keys, values, layer, *info)
    rows, _, heads, _ = partition_spec((*axes, None, "kv_heads", None), keys.shape[1:], mesh)
    q_spec, cache_spec = PartitionSpec(rows, None, heads, None), PartitionSpec(None, rows, None, heads, None)
    specs = (q_spec, cache_spec, cache_spec, PartitionSpec(), *[PartitionSpec(rows, None)] * 4)
    return jax.shard_map(local, in_specs=specs, out_specs=q_spec, check_vma=False)(q, keys, values, layer, *info)


def _operand_specs(
    q: jax.Array, k: jax.Array, axes: tuple[str | None, ...], mesh
) -> tuple[tuple[PartitionSpec, ...], str | None]:
    """Returns the partition specs of the operands, and the mesh axis over which keys are split like their queries."""
    lead = tuple(partition_spec(axes, q.shape[:-3], mesh))
    length = partition_spec(("length",), q.shape[-3:-2], mesh)[0]
    taken = {name for entry in lead if entry for name in ([entry] if isinstance(entry, str) else entry)}
    length = None if length in taken else length
    heads = partition_spec(("kv_heads",), k.shape[-2:-1], mesh)[0]
    heads = None if heads in taken else heads
    ring_axis = length if q.shape[-3] == k.shape[-3] else None
    q_spec, kv_spec = PartitionSpec(*lead, length, heads, None), PartitionSpec(*lead, ring_axis, heads, None)
    q_info, kv_info = PartitionSpec(*lead, length), PartitionSpec(*lead, ring_axis)
    return (q_spec, kv_spec, kv_spec, q_info, kv_info, q_info, kv_info), ring_axis


def _ring_attention(*operands, causal, backend, axis):
    shape = operands[0].shape
    operands = _flatten_rows(*operands)
    backend = backend or select_backend(*operands[:3], causal)
    return ring_attention(*operands, causal=causal, scale=shape[-1] ** -0.5, axis=axis, local=backend).reshape(shape)


def _local_attention(*operands, causal, backend):
    shape = operands[0].shape
    operands = _flatten_rows(*operands)
    return local_attention(*operands, causal=causal, scale=shape[-1] ** -0.5, backend=backend).reshape(shape)


def _flatten_rows(q, k, v, q_segment, kv_segment, q_position, kv_position):
    """Merges all leading dimensions into one, as the backends expect."""
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    info = [x.reshape(-1, x.shape[-1]) for x in (q_segment, q_position, kv_segment, kv_position)]
    return q, k, v, SegmentInfo(*info[:2]), SegmentInfo(*info[2:])
