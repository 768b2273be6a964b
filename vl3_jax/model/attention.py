"""The model's one attention function.

Training, prefill, decoding against a cache, and the tower's frames are all calls of it. What it runs on is chosen
by shape: a few queries against many keys are one dense product; everything else goes in blocks.
"""

import jax
from jax.sharding import PartitionSpec

from vl3_jax.kernels.blockwise import blockwise_attention
from vl3_jax.kernels.dense import dense_attention
from vl3_jax.kernels.labels import Labels
from vl3_jax.parallel.rules import current_mesh, partition_spec

# Up to this many queries the scores are no larger than a few keys' worth of activations.
FEW_QUERIES = 16


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
) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v, where a query sees the keys of its own segment.

    Args:
      q: [*lead, L, H, D]; k, v: [*lead, S, K, D], where K divides H (grouped queries).
      q_segment, kv_segment: [*lead, L], [*lead, S] int32; segment 0 attends to nothing and gives zeros.
      q_position, kv_position: the same shapes; needed when `causal`.
      causal: a query sees only keys whose position is not later than its own.
      axes: logical axes of the leading dimensions; heads split over `tensor` where both H and K divide, and queries
        (not keys) over `context`.

    Returns:
      [*lead, L, H, D] in the type of q.
    """
    if causal and (q_position is None or kv_position is None):
        raise ValueError("causal attention needs the positions of queries and keys")
    q_position = q_segment if q_position is None else q_position
    kv_position = kv_segment if kv_position is None else kv_position
    operands = (q, k, v, q_segment, kv_segment, q_position, kv_position)

    def local(*operands: jax.Array) -> jax.Array:
        return _on_one_device(*operands, causal=causal)

    mesh = current_mesh()
    if mesh is None:
        return local(*operands)
    specs = _operand_specs(q, k, axes, mesh)
    return jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=False)(*operands)


def _operand_specs(q: jax.Array, k: jax.Array, axes: tuple[str | None, ...], mesh) -> tuple[PartitionSpec, ...]:
    lead = tuple(partition_spec(axes, q.shape[:-3], mesh))
    length = partition_spec(("length",), q.shape[-3:-2], mesh)[0]
    taken = {name for entry in lead if entry for name in ([entry] if isinstance(entry, str) else entry)}
    length = None if length in taken else length
    heads = partition_spec(("kv_heads",), k.shape[-2:-1], mesh)[0]
    heads = None if heads in taken else heads
    q_spec, kv_spec = PartitionSpec(*lead, length, heads, None), PartitionSpec(*lead, None, heads, None)
    q_labels, kv_labels = PartitionSpec(*lead, length), PartitionSpec(*lead, None)
    return q_spec, kv_spec, kv_spec, q_labels, kv_labels, q_labels, kv_labels


def _on_one_device(q, k, v, q_segment, kv_segment, q_position, kv_position, *, causal):
    shape = q.shape
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    labels = [x.reshape(-1, x.shape[-1]) for x in (q_segment, q_position, kv_segment, kv_position)]
    backend = dense_attention if q.shape[1] <= FEW_QUERIES else blockwise_attention
    scale = shape[-1] ** -0.5
    return backend(q, k, v, Labels(*labels[:2]), Labels(*labels[2:]), causal=causal, scale=scale).reshape(shape)
