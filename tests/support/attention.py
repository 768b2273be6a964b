"""Inputs for attention tests, and the exact result of attention in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from vl3_jax.kernels.backend import AttentionInputs, Backend, attend
from vl3_jax.kernels.ring import ring_backend
from vl3_jax.kernels.segment_info import SegmentInfo
from vl3_jax.parallel.mesh import make_mesh


def exact_attention(inputs: AttentionInputs) -> np.ndarray:
    """Computes attention by its definition in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (inputs.q, inputs.k, inputs.v))
    q_info, kv_info = inputs.q_info, inputs.kv_info
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    scores = np.einsum("blhd,bshd->bhls", q, k) * q.shape[-1] ** -0.5
    allowed = (q_info.segment_ids[:, :, None] == kv_info.segment_ids[:, None]) & (q_info.segment_ids[:, :, None] > 0)
    if inputs.causal:
        allowed &= kv_info.positions[:, None] <= q_info.positions[:, :, None]
    scores = np.where(allowed[:, None], scores, -np.inf)
    row_max = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(row_max), row_max, 0))
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bhls,bshd->blhd", weights, v)


def make_segment_info(lengths: list[int], size: int, padding_first: bool = False) -> SegmentInfo:
    """Returns one row with segments of these lengths, truncated to `size`, with padding at one end."""
    segment_ids = np.concatenate([np.full(n, i) for i, n in enumerate(lengths, 1)] or [[]])[:size].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths] or [[]])[:size].astype(np.int32)
    padding = (size - len(segment_ids), 0) if padding_first else (0, size - len(segment_ids))
    return SegmentInfo(np.pad(segment_ids, padding)[None], np.pad(positions, padding)[None])


def stack_rows(*rows: SegmentInfo) -> SegmentInfo:
    """Stacks rows into a batch."""
    return SegmentInfo(*(np.concatenate(arrays) for arrays in zip(*rows, strict=True)))


def random_inputs(
    heads: int,
    kv_heads: int,
    width: int,
    q_info: SegmentInfo,
    kv_info: SegmentInfo | None = None,
    *,
    causal: bool,
    seed: int = 0,
    dtype=jnp.float32,
    rotary: bool = False,
) -> AttentionInputs:
    """Returns random queries, keys and values for these segments, and a rotary table if asked for.

    None for `kv_info` takes those of the queries.
    """
    kv_info = q_info if kv_info is None else kv_info
    kv_shape = (*kv_info.segment_ids.shape, kv_heads, width)
    shapes = (*q_info.segment_ids.shape, heads, width), kv_shape, kv_shape
    rng = np.random.default_rng(seed)  # of NumPy, because XLA compiles its own anew for each shape
    q, k, v = (jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in shapes)
    angles = rng.uniform(0, 100, (*shapes[0][:2], width // 2)).astype(np.float32)
    table = jnp.asarray(np.concatenate([np.cos(angles), np.sin(angles)], -1)) if rotary else None
    return AttentionInputs(q, k, v, q_info, kv_info, causal=causal, scale=width**-0.5, rotary=table)


def cast(inputs: AttentionInputs, dtype) -> AttentionInputs:
    """Returns the inputs with queries, keys and values of another dtype."""
    return inputs.replace(q=inputs.q.astype(dtype), k=inputs.k.astype(dtype), v=inputs.v.astype(dtype))


@functools.cache
def attention_of(backend: Backend):
    """Returns the attention function of a backend, always the same one, so that it is compiled once."""
    return functools.partial(attend, backend)


def ring_over_arrays(local: Backend, devices: int = 4):
    """Returns ring attention over this many devices as a function of whole arrays."""
    mesh, split = make_mesh({"context": devices}, jax.devices()[:devices]), PartitionSpec(None, "context")
    run = attention_of(ring_backend(local, "context"))
    return jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)


@functools.partial(jax.jit, static_argnames="attention")
def value_and_gradients(attention, inputs: AttentionInputs):
    """Returns the output of an attention function, and the gradients of q, k and v for a fixed weighting of it."""

    def loss(q, k, v):
        out = attention(inputs.replace(q=q, k=k, v=v))
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    arrays = inputs.q, inputs.k, inputs.v
    (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)
    return out, gradients
