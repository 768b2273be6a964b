"""Attention of a few queries to a cache for TPUs: one Pallas kernel over the blocks of slots in use.

A grid step processes all heads of a row. Slots and key heads share one axis, as they do in memory, and queries of other
groups are masked: the matrix unit would be idle otherwise, and keys are only copied from HBM to VMEM.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vl3_jax.kernels import online_softmax
from vl3_jax.kernels.backend import AttentionInputs
from vl3_jax.kernels.block_sizes import LANES
from vl3_jax.kernels.blockwise_decode import largest_block, used_blocks
from vl3_jax.kernels.einsum import einsum

BLOCK = 512  # slots


def tpu_decode_attention(inputs: AttentionInputs, layer: jax.Array, interpret: bool = False) -> jax.Array:
    """Equals `blockwise_decode_attention`; D must be a multiple of 128.

    Args:
      inputs: Operands of attention, of which L is small and the keys and values are those of all layers.
      layer: Index of the layer, [] int32.
      interpret: Whether to interpret the kernel, which works on any device but is slow.

    Returns:
      The attention output, [B, L, H, D] in the dtype of `q`.
    """
    q = inputs.q
    rows, length, heads, width = q.shape
    layers, _, slots, kv_heads, _ = inputs.k.shape
    block = largest_block(slots, BLOCK)
    order, count = used_blocks(inputs, block)
    flat_q = q.swapaxes(1, 2).reshape(rows, heads * length, width)
    flat_q_info = jnp.tile(jnp.stack(inputs.q_info, axis=-1), (1, heads, 1))
    flat_kv_info = jnp.repeat(jnp.stack(inputs.kv_info, axis=1), kv_heads, axis=-1)
    keys, values = (x.reshape(layers, rows, slots * kv_heads, width) for x in (inputs.k, inputs.v))

    def row_index(b, step, *_):
        return b, 0, 0

    def kv_index(b, step, layer, order, count):
        return layer[0], b, order[b, jnp.minimum(step, jnp.maximum(count[b] - 1, 0))], 0

    def kv_info_index(b, step, *scalars):
        return b, 0, kv_index(b, step, *scalars)[2]

    columns = block * kv_heads
    cache_spec = pl.BlockSpec((None, None, columns, width), kv_index)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(rows, jnp.maximum(count.max(), 1)),
        in_specs=[
            pl.BlockSpec((None, heads * length, width), row_index),
            pl.BlockSpec((None, heads * length, 2), row_index),
            pl.BlockSpec((None, 2, columns), kv_info_index),
            cache_spec,
            cache_spec,
        ],
        out_specs=pl.BlockSpec((None, heads * length, width), row_index),
        scratch_shapes=[pltpu.VMEM((heads * length, size), jnp.float32) for size in (1, 1, width)],
    )
    kernel = functools.partial(_kernel, kv_heads=kv_heads, causal=inputs.causal, scale=inputs.scale)
    out = pl.pallas_call(
        kernel,
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct(flat_q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="decode_kernel",
    )(layer[None], order, count, flat_q, flat_q_info, flat_kv_info, keys, values)
    return out.reshape(rows, heads, length, width).swapaxes(1, 2)


def tpu_decode_unsupported_reason(inputs: AttentionInputs) -> str | None:
    """Returns why the kernel does not support these operands, in a few words; None if it does."""
    slots, kv_heads, width = inputs.k.shape[2:]
    if width % LANES:
        return f"heads of {width} channels, not a multiple of {LANES}"
    if largest_block(slots, BLOCK) * kv_heads % LANES:
        return f"a cache of {slots} slots, which has no blocks of a multiple of {LANES} keys"
    return None


def _kernel(layer, order, count, q, q_info, kv_info, keys, values, out, *state_refs, kv_heads, causal, scale):
    """Processes one block of slots of a row.

    Queries are [H * L, D], keys and values [block * K, D]; `state_refs` is an `OnlineSoftmaxState` in VMEM.
    """
    row, step = pl.program_id(0), pl.program_id(1)

    @pl.when(step == 0)
    def _():
        for ref, value in zip(state_refs, online_softmax.init(q.shape), strict=True):
            ref[...] = value

    @pl.when(step < count[row])
    def _():
        scores = einsum("rd,sd->rs", q[...], keys[...].astype(q.dtype), out_dtype=jnp.float32) * scale
        group = q.shape[0] // kv_heads
        q_rows, kv_columns = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
        segment_ids, positions = q_info[:, 0:1], q_info[:, 1:2]
        allowed = (segment_ids == kv_info[0:1]) & (segment_ids > 0) & (q_rows // group == kv_columns % kv_heads)
        if causal:
            allowed &= kv_info[1:2] <= positions
        state = online_softmax.OnlineSoftmaxState(*(ref[...] for ref in state_refs))
        state = online_softmax.update(state, scores, allowed, values[...].astype(q.dtype), "rs,sd->rd")
        for ref, value in zip(state_refs, state, strict=True):
            ref[...] = value

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        state = online_softmax.OnlineSoftmaxState(*(ref[...] for ref in state_refs))
        out[...] = online_softmax.finalize(state)[0].astype(out.dtype)
